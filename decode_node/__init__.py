"""The process that receives state and streams tokens."""
