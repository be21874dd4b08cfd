"""What a checkpoint's model consists of: one declaration a family, without numbers."""
