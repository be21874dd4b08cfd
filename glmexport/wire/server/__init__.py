"""What runs on a server that is deployed to: the standard library of Python 3.9, and the openssl program."""
