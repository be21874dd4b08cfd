"""The way to other machines: SSH, transfer of files, and the programs that are sent there."""
