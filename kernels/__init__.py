"""The model's operations: one op per file, each with its torch reference twin and a launcher."""
