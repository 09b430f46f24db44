// An MCP client made of the npm package @modelcontextprotocol/sdk, which does what lines on stdin say:
// `node client.mjs URL CALLER` or `node client.mjs stdio COMMAND...`. Each command is answered by a line with its number.

import { createInterface } from "node:readline";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { CreateMessageRequestSchema, ToolListChangedNotificationSchema } from "@modelcontextprotocol/sdk/types.js";

const [where, ...rest] = process.argv.slice(2);
// Of a caller without a name: none.
const headers = rest[0] ? { "X-Test-Caller": rest[0], Authorization: "Bearer of-the-agent" } : {};
const transport =
    where === "stdio"
        ? new StdioClientTransport({ command: rest[0], args: rest.slice(1), env: process.env })
        : new StreamableHTTPClientTransport(new URL(where), { requestInit: { headers } });
const client = new Client({ name: "agent", version: "1.0.0" }, { capabilities: { sampling: {} } });
const notified = [];
const running = new Map();
client.setNotificationHandler(ToolListChangedNotificationSchema, () => void notified.push("tools/list_changed"));
client.setRequestHandler(CreateMessageRequestSchema, async ({ params }) => ({
    model: "test",
    role: "assistant",
    content: { type: "text", text: `42 (${params.messages[0].content.text})` },
}));

const commands = {
    async connect() {
        await client.connect(transport);
        return { server: client.getServerVersion().name, session: transport.sessionId ?? null };
    },
    list: async () => (await client.listTools()).tools.map((tool) => tool.name),
    async call({ name, arguments: given, progress, timeout, number }) {
        const told = [];
        const abort = new AbortController();
        running.set(number, abort);
        const options = { timeout: timeout ?? 20000, signal: abort.signal };
        if (progress) options.onprogress = (progress) => void told.push(progress);
        const result = await client.callTool({ name, arguments: given }, undefined, options);
        return { text: result.content[0].text, is_error: result.isError ?? false, meta: result._meta ?? null, progress: told };
    },
    cancel: async ({ call }) => running.get(call).abort("no longer"),
    request: async ({ method, params }) => await client.request({ method, params }, { parse: (x) => x, safeParse: (data) => ({ success: true, data }) }),
    notified: async () => notified,
    terminate: async () => await transport.terminateSession(),
    close: async () => await client.close(),
};
for await (const line of createInterface({ input: process.stdin })) {
    const command = JSON.parse(line);
    commands[command.do](command)
        .then((result) => console.log(JSON.stringify({ number: command.number, result: result ?? null })))
        .catch((error) => console.log(JSON.stringify({ number: command.number, error: { message: error.message, code: error.code ?? null } })));
}
process.exit(0);
