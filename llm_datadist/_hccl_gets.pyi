from llm_datadist._hccl_exchange import Exchange
from llm_datadist._hccl_regions import OneSidedCommunicator

class OneSidedExchange(Exchange):
    def adopt_bound(self, communicator: OneSidedCommunicator, peer_address: int, peer_nbytes: int) -> None: ...
