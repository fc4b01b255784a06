"""How the pages answer many visitors at once: ``python tests/apps/load.py [VISITORS] [MODEL]``.

Visitors speak Streamlit's own protocol, without a browser. Each opens a map of the shipped model by its address, one
layer after the other, and waits for the whole page. Prints the wait of one visitor alone, then of all at once, for
views that nobody has asked for before and for views that somebody has.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from pathlib import Path
from urllib.parse import urlencode

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from serving import serve

VIEWS = 3
VISITORS = 20


def main(visitors: int, model: str) -> None:
    """Print the waits."""
    with serve() as url:
        address = url.replace("http://", "ws://") + "/_stcore/stream"
        asyncio.run(visit(address, model, 0))
        alone = [asyncio.run(visit(address, model, 0)) for _ in range(VIEWS)]
        print(f"one visitor, a view seen before: median {statistics.median(alone):.2f} s")
        for words in ("some views for the first time", "views seen before"):
            waits = sorted(asyncio.run(together(address, model, visitors)))
            middle, late = statistics.median(waits), waits[int(0.95 * (len(waits) - 1))]
            print(f"{visitors} visitors at once, {words}: median {middle:.2f} s, 95 % within {late:.2f} s")
    spent = os.times()
    print(f"processor time of the server {spent.children_user + spent.children_system:.0f} s, ", end="")
    print(f"load average of the last minute {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


async def together(address: str, model: str, visitors: int) -> list[float]:
    """The waits of all visitors for all their views."""

    async def one(number: int) -> list[float]:
        return [await visit(address, model, (number + step) % 4) for step in range(VIEWS)]

    return [wait for waits in await asyncio.gather(*map(one, range(visitors))) for wait in waits]


async def visit(address: str, model: str, layer: int) -> float:
    """Seconds from opening a session to the end of its page.

    Raises:
        RuntimeError: when the page shows an error.
    """
    from streamlit.proto.BackMsg_pb2 import BackMsg
    from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
    from websockets.asyncio.client import connect

    start = time.perf_counter()
    async with connect(address, subprotocols=["streamlit"], max_size=None, open_timeout=60) as session:
        ask = BackMsg()
        ask.rerun_script.query_string = urlencode({"model": model, "layer": layer, "view": "norm"})
        ask.rerun_script.page_name = "attention"
        await session.send(ask.SerializeToString())
        drawn = False
        async for raw in session:
            said = ForwardMsg()
            said.ParseFromString(raw)
            element = said.delta.new_element
            if element.HasField("exception") or (element.HasField("alert") and element.alert.format == 1):
                raise RuntimeError(element.exception.message or element.alert.body)
            if element.HasField("bidi_component"):
                drawn = drawn or "Implicit attention" in element.bidi_component.json
            if said.HasField("script_finished"):
                break
    if not drawn:
        raise RuntimeError("the page ended without its map")
    return time.perf_counter() - start


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else VISITORS, arguments[1] if len(arguments) > 1 else "mamba1-english")
