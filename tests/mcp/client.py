"""An MCP client made of the PyPI package `mcp`, which does what lines on stdin say: `client.py MODE URL CALLER` or
`client.py MODE stdio COMMAND...`, where MODE is auto, legacy or a version. Each command is answered by a line with its number."""

import asyncio
import json
import os
import sys

from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp_types import CreateMessageResult, TextContent

mode, where, *rest = sys.argv[1:]
running = {}


async def sample(_, params):
    question = params.messages[0].content.text
    return CreateMessageResult(role="assistant", model="test", content=TextContent(type="text", text=f"42 ({question})"))


def target():
    if where == "stdio":
        return StdioServerParameters(command=rest[0], args=rest[1:], env=dict(os.environ))
    headers = {"X-Test-Caller": rest[0], "Authorization": "Bearer of-the-agent"} if rest else {}
    return streamable_http_client(where, http_client=create_mcp_http_client(headers=headers))


async def call(client, command):
    told = []

    async def progress(progress, total, message):
        told.append({"progress": progress, "total": total, "message": message})

    callback = progress if command.get("progress") else None
    result = await client.call_tool(command["name"], command["arguments"], progress_callback=callback)
    text = result.content[0].text
    return {"text": text, "is_error": bool(result.is_error), "meta": result.meta, "progress": told}


async def do(client, command):
    match command["do"]:
        case "connect":
            return {"version": client.protocol_version}
        case "list":
            return [tool.name for tool in (await client.list_tools()).tools]
        case "call":
            return await call(client, command)
        case "cancel":
            running[command["call"]].cancel()


async def answer(client, command):
    number = command["number"]
    try:
        result = {"number": number, "result": await do(client, command)}
    except asyncio.CancelledError:
        result = {"number": number, "error": {"message": "cancelled", "code": None}}
    except Exception as error:
        result = {"number": number, "error": {"message": str(error), "code": getattr(error, "code", None)}}
    print(json.dumps(result), flush=True)


async def main():
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with Client(target(), mode=mode, sampling_callback=sample) as client:
        while line := await lines.readline():
            command = json.loads(line)
            running[command["number"]] = asyncio.create_task(answer(client, command))


asyncio.run(main())
