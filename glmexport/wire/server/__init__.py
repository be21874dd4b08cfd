"""The program that runs on a server that is deployed to: it needs Python 3.9 and the openssl program alone."""
