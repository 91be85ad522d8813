"""Has the same requests answered by the model in one process of its own, for comparison."""

from __future__ import annotations

from llm_datadist.cluster.local import LocalGroup
from llm_datadist.tools.demo.local_messages import local_messages
from llm_datadist.tools.demo.messages import Referenced
from llm_datadist.tools.demo.outcome import Outcome, RequestRecord
from llm_datadist.tools.demo.reference_worker import answer_alone
from llm_datadist.tools.demo.screen import Screen
from llm_datadist.tools.demo.worker import run_worker


def check_alone(group: LocalGroup, outcome: Outcome, screen: Screen) -> None:
    """Fill in the reference of every record. A prompt that occurs several times is answered once."""
    records: dict[str, list[RequestRecord]] = {}
    for record in outcome.records:
        records.setdefault(record.request.prompt, []).append(record)
    requests = [same[0].request for same in records.values()]
    prompts = {request.number: request.prompt for request in requests}
    screen.checking(0, len(requests))
    worker = group.start("reference", run_worker, answer_alone, requests, outcome.max_new_tokens)
    for done, (_, message) in enumerate(local_messages([worker]), start=1):
        assert isinstance(message, Referenced)
        for record in records[prompts[message.request]]:
            record.reference = message
        screen.checking(done, len(requests))
