"""Who owns which page. One page holds the compressed history of `page_tokens` tokens of one request."""

from engine.pool import Pool


class PagePool(Pool):
    """The pages of one rank; their bytes are in `memory.StateMemory.pages`."""

    def __init__(self, count: int, page_tokens: int) -> None:
        super().__init__("page", count)
        self.page_tokens = page_tokens

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold the history of `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)
