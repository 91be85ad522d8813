"""The requests of a run, and the built-in prompts: short and long ones, so that their KV caches differ in size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import NamedTuple

_STORY = (
    "The old lighthouse had been dark for eleven years when the letter came. It was addressed to the keeper, a job "
    "that no longer existed, and the postman, not knowing what else to do with it, pushed it under the door. Marta "
    "found it there on a Sunday, when she walked out along the causeway to look at the seals. She should not have "
    "opened it, but the paper was so damp that it opened by itself. It said: the ship will pass on the ninth, an "
    "hour after midnight, please light the lamp. There was no name below it. Marta laughed, and put the letter in "
    "her pocket, and thought about it for a week. On the ninth she filled two cans with oil and climbed the hundred"
    " and forty steps. The lamp was rusty and full of dust. It took her three hours to clean the glass, and when "
    "she lit the wick, she saw far out on the water a small green light that went slowly from the left to the right"
    " and blinked twice."
)

_REPORT = (
    "Minutes of the garden club, 4 May. Present: nine members. 1. The tomatoes in the greenhouse have been watered "
    "too much; Paul will water them every second day from now on. 2. The club bought 25 bags of compost for 112 "
    "euros. 3. The fence at the north side is broken in two places, and rabbits eat the lettuce; Anna and Joe will "
    "repair it before the weekend. 4. The summer party will be on 21 June; everybody brings a salad or a cake. 5. "
    "The school asks whether 20 children may visit in the autumn to plant bulbs; all members agreed."
)

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    f"Summarise this story in two sentences.\n\n{_STORY}",
    "Explain photosynthesis in simple words.",
    "Explain to a child why the sky is blue.",
    f"Who will repair the fence, and why is it needed? Answer from this text.\n\n{_REPORT}",
    "List three things to pack for a walk in the mountains.",
    "What does this Python function do?\n\ndef f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)",
    f"Suggest a title for this story and explain your choice.\n\n{_STORY}",
)


class Request(NamedTuple):
    """A prompt to answer; `number` counts from 1 and names its KV cache."""

    number: int
    prompt: str


def choose_requests(prompts: Sequence[str], count: int | None) -> list[Request]:
    """Return `count` requests that take the given prompts, or the built-in ones if there are none, in turn."""
    chosen = prompts or PROMPTS
    texts = islice(cycle(chosen), count or len(chosen))
    return [Request(number, text) for number, text in enumerate(texts, start=1)]
