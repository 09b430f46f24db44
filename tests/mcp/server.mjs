// An MCP server made of the npm package @modelcontextprotocol/sdk. `node server.mjs http|json|stdio`: over HTTP it says its
// address on stdout, and at /seen which headers it got.

import { createServer } from "node:http";
import { randomUUID } from "node:crypto";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
import { StdioServerTransport } from "@modelcontextprotocol/sdk/server/stdio.js";
import { CreateMessageResultSchema } from "@modelcontextprotocol/sdk/types.js";
import { z } from "zod";

const text = (text) => ({ content: [{ type: "text", text: String(text) }] });
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const cancelled = [];
const sessions = new Map();

function make() {
    const server = new McpServer({ name: "tools", version: "1.0.0" }, { capabilities: { logging: {} } });
    const tool = (name, inputSchema, run) => server.registerTool(name, { description: name, inputSchema }, run);
    tool("add", { a: z.number(), b: z.number() }, ({ a, b }) => text(a + b));
    tool("echo", { value: z.any() }, ({ value }) => text(JSON.stringify(value)));
    tool("refund", { amount: z.string() }, ({ amount }) => text(`refunded ${amount}`));
    tool("secret", {}, () => text("the secret"));
    tool("pid", {}, () => text(process.pid));
    tool("die", {}, () => process.exit(1));
    tool("forget", {}, () => {
        sessions.clear();
        return text("all sessions");
    });
    tool("cancelled", {}, () => text(cancelled.join(" ")));
    tool("big", { bytes: z.number() }, ({ bytes }) => text("x".repeat(bytes)));
    tool("count", { to: z.number() }, async ({ to }, extra) => {
        for (let progress = 1; progress <= to; progress++) {
            const params = { progressToken: extra._meta?.progressToken, progress, total: to };
            await extra.sendNotification({ method: "notifications/progress", params });
            await sleep(20);
        }
        return text(`counted to ${to}`);
    });
    tool("ask", { question: z.string() }, async ({ question }, extra) => {
        const params = { messages: [{ role: "user", content: { type: "text", text: question } }], maxTokens: 10 };
        const answer = await extra.sendRequest({ method: "sampling/createMessage", params }, CreateMessageResultSchema);
        return text(`the model says: ${answer.content.text}`);
    });
    tool("sleep", { name: z.string() }, async ({ name }, extra) => {
        extra.signal.addEventListener("abort", () => cancelled.push(name));
        for (let n = 0; n < 200 && !extra.signal.aborted; n++) await sleep(50);
        return text("slept");
    });
    tool("grow", { name: z.string() }, ({ name }) => {
        tool(name, {}, () => text(name));
        return text("grown");
    });
    return server;
}

if (process.argv[2] === "stdio") {
    process.stderr.write(`arguments ${process.argv.slice(3)}\n`);
    await make().connect(new StdioServerTransport());
} else {
    const seen = [];
    const events = [];
    const eventStore = {
        async storeEvent(stream, message) {
            events.push({ stream, message });
            return `${events.length}`;
        },
        async replayEventsAfter(last, { send }) {
            const { stream } = events[Number(last) - 1];
            for (let n = Number(last); n < events.length; n++) {
                if (events[n].stream === stream && Object.keys(events[n].message).length > 0) await send(`${n + 1}`, events[n].message);
            }
            return stream;
        },
    };
    const http = createServer(async (request, response) => {
        if (request.url === "/seen") return response.end(JSON.stringify(seen));
        seen.push({ method: request.method, headers: request.rawHeaders });
        response.setHeader("Set-Cookie", "upstream=secret; Path=/");
        response.setHeader("X-Upstream", "secret");
        const id = request.headers["mcp-session-id"];
        let transport = sessions.get(id);
        if (id && !transport) {
            response.writeHead(404).end();
            return;
        }
        if (!transport) {
            transport = new StreamableHTTPServerTransport({
                sessionIdGenerator: () => `upstream-${randomUUID()}`,
                enableJsonResponse: process.argv[2] === "json",
                eventStore: process.argv[2] === "resumable" ? eventStore : undefined,
                retryInterval: 50,
                onsessioninitialized: (id) => sessions.set(id, transport),
                onsessionclosed: (id) => sessions.delete(id),
            });
            await make().connect(transport);
        }
        await transport.handleRequest(request, response);
    });
    http.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${http.address().port}/mcp`));
}
