"""A GPU kept busy as a decoding engine keeps it: captured steps, one launched ahead, on a stream of their own."""

import threading
import time

import torch

_SIDE = 4096


class BusySteps:
    """Launched by a thread of its own while it is inside `with`."""

    def __init__(self, device: torch.device, step_s: float) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        square = torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
        product = torch.empty_like(square)
        with torch.cuda.stream(self._stream):
            self._multiply(square, product, 4)
            began = time.perf_counter()
            self._multiply(square, product, 32)
            count = max(1, round(step_s / ((time.perf_counter() - began) / 32)))
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                for _ in range(count):
                    torch.mm(square, square, out=product)
        self._tensors = square, product
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.times_s: list[float] = []
        """From the launch of one step to that of the next."""

    def __enter__(self) -> "BusySteps":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _multiply(self, square: torch.Tensor, product: torch.Tensor, count: int) -> None:
        for _ in range(count):
            torch.mm(square, square, out=product)
        torch.cuda.synchronize(self._device)

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        ahead = self._launch()
        while not self._stop.is_set():
            began = time.perf_counter()
            following = self._launch()
            ahead.synchronize()
            ahead = following
            self.times_s.append(time.perf_counter() - began)
        ahead.synchronize()

    def _launch(self) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            self._graph.replay()
        event = torch.cuda.Event()
        event.record(self._stream)
        return event
