// A receiver of webhooks that believes what the library `standardwebhooks` verifies, and nothing else.
//
//   node hook.mjs CERTIFICATE KEY SECRET     three files; one JSON object a line on standard output
//
//   {"port"}                                 where it listens
//   {"id", "payload"}                        a message that verifies
//   {"id", "refused"}                        one that does not
//
// It takes no message the first time, so that a sender has to come again.
import { readFileSync } from 'node:fs';
import { createServer } from 'node:https';
import { Webhook } from 'standardwebhooks';

const [cert, key, secret] = process.argv.slice(2).map((path) => readFileSync(path, 'utf8'));
const webhook = new Webhook(secret.trim());
const seen = new Set();
const say = (what) => console.log(JSON.stringify(what));

const server = createServer({ cert, key }, async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const id = request.headers['webhook-id'];
  try {
    say({ id, payload: webhook.verify(Buffer.concat(chunks).toString(), request.headers) });
  } catch (error) {
    say({ id, refused: String(error) });
  }
  response.writeHead(seen.has(id) ? 204 : 503).end();
  seen.add(id);
});
server.listen(0, '127.0.0.1', () => say({ port: server.address().port }));
