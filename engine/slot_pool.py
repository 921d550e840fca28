"""Who owns which slot. One slot holds the part of a request's state that does not grow: rings and open blocks."""

from engine.pool import Pool


class SlotPool(Pool):
    """The slots of one rank; their bytes are in `memory.StateMemory.slots`. A holding has exactly one id."""

    def __init__(self, count: int) -> None:
        super().__init__("slot", count)
