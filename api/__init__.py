"""Text to tokens and back, and the HTTP shapes around them. No torch."""
