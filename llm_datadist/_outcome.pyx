"""How a transfer ended, however its bytes moved."""


class TransferFault(Exception):
    """A one-sided transfer failed; tells how, and what the remote cache looks like if it was found.

    `detail` is what a device or its library has said.
    """

    def __init__(self, outcome, remote_tensors=0, remote_slots=0, remote_stride=0, detail=""):
        self.outcome = Outcome(outcome)
        super().__init__(self.outcome)
        self.remote_tensors = remote_tensors
        self.remote_slots = remote_slots
        self.remote_stride = remote_stride
        self.detail = detail
