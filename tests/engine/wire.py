"""A small honest transfer between engines of one process: it copies bytes between their pools, when the test says so.

Both ends keep the promises of `engine.connector`. A fetch copies only pages the sender announced or handed over, and
the test decides when anything happens, and may let a read still write after the receiver was told that it failed.
"""

from engine.connector import Quiet, Received, ReceiveFailed, SendEnded


class Wire:
    """What lies between the connectors: sends that are open and receives that wait for them, by transfer id."""

    def __init__(self):
        self.sends = {}
        self.receives = {}

    def pump(self):
        """Let every receive whose send is ready arrive."""
        for transfer_id in list(self.receives):
            self.deliver(transfer_id)

    def deliver(self, transfer_id):
        """Copy one state if both ends are there; True if it arrived."""
        send, receive = self.sends.get(transfer_id), self.receives.get(transfer_id)
        if send is None or receive is None or send["first"] is None:
            return False
        assert send["prompt"] == receive["prompt"]
        assert len(send["pages"]) == len(receive["pages"]), (send, receive)
        self._write(send, receive)
        receive["to"].events.append(
            Received(
                transfer_id=transfer_id, first=send["first"], num_bytes=1, transfer_s=0.0, exposed_s=0.0, wait_s=0.0
            )
        )
        del self.receives[transfer_id]
        self.end_send(transfer_id, "fetched")
        return True

    def end_send(self, transfer_id, outcome):
        send = self.sends.pop(transfer_id)
        send["to"].events.append(SendEnded(transfer_id, outcome))

    def fail(self, transfer_id, *, retryable=True):
        """The receiver is told; its read is still in flight until `quiet`."""
        receive = self.receives.pop(transfer_id)
        receive["to"].in_flight[transfer_id] = receive
        receive["to"].events.append(ReceiveFailed(transfer_id, f"transfer {transfer_id}: peer lost", retryable))

    @staticmethod
    def _write(send, receive):
        source, target = send["to"].model, receive["to"].model
        for here, there in zip(send["pages"], receive["pages"], strict=True):
            target.pages[there] = source.pages[here]
        target.slots[receive["slot"]] = source.slots[send["slot"]]


class WireConnector:
    """One engine's end. `model` is set after the engine is made."""

    def __init__(self, wire):
        self.wire = wire
        self.model = None
        self.events = []
        self.in_flight = {}
        self.announced = {}
        self.released = []

    def open_send(self, transfer_id, prompt_ids):
        assert transfer_id not in self.wire.sends
        self.wire.sends[transfer_id] = {
            "to": self, "prompt": list(prompt_ids), "pages": [], "slot": None, "first": None,
        }  # fmt: skip

    def pages_final(self, transfer_id, page_ids):
        self.wire.sends[transfer_id]["pages"].extend(page_ids)
        self.announced[transfer_id] = self.announced.get(transfer_id, 0) + len(page_ids)

    def send_ready(self, transfer_id, page_ids, slot_id, first):
        send = self.wire.sends[transfer_id]
        send["pages"].extend(page_ids)
        send["slot"], send["first"] = slot_id, first

    def cancel_send(self, transfer_id, reason):
        # As the agent does: a send that has ended already, of which the engine has not heard yet, is let be.
        if transfer_id in self.wire.sends:
            self.wire.end_send(transfer_id, "failed")

    def receive(self, transfer_id, source_address, source_epoch, prompt_ids, page_ids, slot_id):
        self.wire.receives[transfer_id] = {
            "to": self, "prompt": list(prompt_ids), "pages": list(page_ids), "slot": slot_id,
        }  # fmt: skip

    def cancel_receive(self, transfer_id):
        receive = self.wire.receives.pop(transfer_id, None)
        if receive is not None:
            self.in_flight[transfer_id] = receive

    def quiet(self, transfer_id):
        """The late read lands, with garbage, and is over."""
        receive = self.in_flight.pop(transfer_id)
        for page in receive["pages"]:
            self.model.pages[page] = 0xEE
        self.model.slots[receive["slot"]] = 0xEE
        self.events.append(Quiet(transfer_id))

    def release(self, transfer_id):
        self.released.append(transfer_id)
        if transfer_id in self.wire.sends and self.wire.sends[transfer_id]["to"] is self:
            self.wire.end_send(transfer_id, "released")
        elif transfer_id in self.wire.receives and self.wire.receives[transfer_id]["to"] is self:
            self.wire.fail(transfer_id, retryable=False)

    def poll(self):
        events, self.events = self.events, []
        return events
