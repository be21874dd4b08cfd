"""What the parts of a conversation mean, for those who judge answers and those who serve them alike."""
