"""The results that validation writes and reports read, and the statistics by which two figures are compared."""
