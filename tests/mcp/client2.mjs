// An MCP client made of the npm package @modelcontextprotocol/client, which knows 2026-07-28: `node client2.mjs MODE URL CALLER`
// or `node client2.mjs MODE stdio COMMAND...`, where MODE is auto or legacy. It does what lines on stdin say.

import { createInterface } from "node:readline";
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";

const [mode, where, ...rest] = process.argv.slice(2);
// Of a caller without a name: none.
const headers = rest[0] ? { "X-Test-Caller": rest[0], Authorization: "Bearer of-the-agent" } : {};
const transport =
    where === "stdio"
        ? new StdioClientTransport({ command: rest[0], args: rest.slice(1), env: process.env })
        : new StreamableHTTPClientTransport(new URL(where), { requestInit: { headers } });
const client = new Client({ name: "agent", version: "1.0.0" }, { versionNegotiation: { mode } });

const commands = {
    async connect() {
        await client.connect(transport);
        return { version: client.getNegotiatedProtocolVersion() };
    },
    list: async () => (await client.listTools()).tools.map((tool) => tool.name),
    async call({ name, arguments: given }) {
        const result = await client.callTool({ name, arguments: given });
        return { text: result.content[0].text, is_error: result.isError ?? false };
    },
};
for await (const line of createInterface({ input: process.stdin })) {
    const command = JSON.parse(line);
    commands[command.do](command)
        .then((result) => console.log(JSON.stringify({ number: command.number, result: result ?? null })))
        .catch((error) => console.log(JSON.stringify({ number: command.number, error: { message: error.message, code: error.code ?? null } })));
}
process.exit(0);
