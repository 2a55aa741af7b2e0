#!/usr/bin/env bash
# A tool client of OpenEnv that cannot reach its server says that there are no tools.
#
# openenv 0.10.0. `MCPToolClient.list_tools()` asks the server by HTTP, in the only mode that the class takes, and answers any
# exception with an empty list: no error, no warning, and not a word in the log. A trainer that starts before its server, or
# with a wrong port, trains a student without tools, whose every answer is then a last one. The same client's `reset()`
# and `call_tool()` raise `ConnectError`; so does `step(ListToolsAction())`, which asks for the same list.
#
# Seen: [] from `list_tools()`, and `ConnectError` from each of the three others. Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet openenv==0.10.0
cd "$here" && "$here/venv/bin/python" - <<'PYTHON'
import asyncio
import socket
import sys

from openenv.core import MCPToolClient
from openenv.core.env_server.mcp_types import ListToolsAction

with socket.socket() as free:  # a port of this machine where nobody listens
    free.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{free.getsockname()[1]}"


async def answer(asked):
    try:
        return repr(await asked(MCPToolClient(base_url=address)))
    except Exception as error:
        return type(error).__name__


async def answers():
    return [
        await answer(lambda client: client.list_tools()),
        await answer(lambda client: client.step(ListToolsAction())),
        await answer(lambda client: client.reset()),
        await answer(lambda client: client.call_tool("add", a=3, b=4)),
    ]


seen = asyncio.run(answers())
print("list_tools(): {}\nstep(ListToolsAction()): {}\nreset(): {}\ncall_tool(...): {}".format(*seen))
sys.exit(0 if seen[0] == "[]" and seen[1:] == ["ConnectError"] * 3 else 1)
PYTHON
