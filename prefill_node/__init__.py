"""The process that turns prompts into state and a first token."""
