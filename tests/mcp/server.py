"""An MCP server made of the PyPI package `mcp`, of both kinds of protocol versions. `server.py http|stdio`: over HTTP it says
its address on stdout, and at /seen which headers it got."""

import asyncio
import json
import socket
import sys
from typing import Annotated

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.resolve import Resolve, Sample
from mcp_types import CreateMessageResult, SamplingMessage, TextContent
from pydantic import Field

server = MCPServer("tools")
seen = []
cancelled = []


@server.tool()
def add(a: int, b: int) -> str:
    return str(a + b)


@server.tool()
def refund(amount: str) -> str:
    return f"refunded {amount}"


@server.tool()
def secret() -> str:
    return "the secret"


@server.tool(name="grüße")
def greet() -> str:
    return "grüße zurück"


@server.tool()
def route(region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})]) -> str:
    return f"routed to {region}"


@server.tool()
async def count(to: int, ctx: Context) -> str:
    for n in range(1, to + 1):
        await ctx.report_progress(n, to)
        await asyncio.sleep(0.02)
    return f"counted to {to}"


@server.tool()
async def sleep(name: str) -> str:
    try:
        await asyncio.sleep(20)
    except asyncio.CancelledError:
        cancelled.append(name)
        raise
    return "slept"


@server.tool(name="cancelled")
def was_cancelled() -> str:
    return " ".join(cancelled)


def question(question: str) -> Sample:
    return Sample([SamplingMessage(role="user", content=TextContent(type="text", text=question))], max_tokens=10)


@server.tool()
def ask(question: str, answer: Annotated[CreateMessageResult, Resolve(question)]) -> str:
    return f"the model says: {answer.content.text}"


def noting(app):
    async def noting_app(scope, receive, send):
        if scope["type"] != "http":
            return await app(scope, receive, send)
        if scope["path"] == "/seen":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            return await send({"type": "http.response.body", "body": json.dumps(seen).encode()})
        headers = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
        seen.append({"method": scope["method"], "headers": headers})
        await app(scope, receive, send)

    return noting_app


if sys.argv[1] == "stdio":
    server.run("stdio")
else:
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/mcp", flush=True)
    config = uvicorn.Config(noting(server.streamable_http_app()), log_level="warning")
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
