"""GLM's grammar of reasoning and tool calls, and the schemas of a tool's arguments."""
