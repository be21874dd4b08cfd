"""The commands that people call: each verb's stages in order, one file a verb."""
