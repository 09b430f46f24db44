// An authorization server (oidc-provider) with a control line: one JSON object a line on standard input, one a line back.
//
//   {"do": "ready"}                                 -> {"issuer", "jwks_uri", "introspection", "jwks"}
//   {"do": "token", "client", "scope", ...}         -> the token endpoint's answer; `certificate` (PEM) and `dpop` bind it
//   {"do": "revoke", "token", "client"}             -> {"ok"}
//   {"do": "proof", "method", "url", ...}           -> {"proof"}: DPoP, of a key of its own; `nonce`, `token`, `changes`
//   {"do": "verify", "token", "keys", ...}         -> {"claims", "typ"}: of a token that another issuer's keys verify
//   {"do": "jwt", "header", "claims"}               -> {"token"}: signed with a key that the issuer publishes
import { createHash, randomUUID } from 'node:crypto';
import { createServer } from 'node:http';
import { createInterface } from 'node:readline';
import * as jose from 'jose';
import Provider from 'oidc-provider';

const AUDIENCE = 'https://ledger.example.org';
const SECRET = 'a-secret-of-the-tests-only';
// By the form of their tokens, and whether these are bound to a certificate. `authd` is the one that introspects.
const clients = ['one', 'opaque', 'one-bound', 'opaque-bound', 'authd'].map((client_id) => ({
  client_id,
  id_token_signed_response_alg: 'ES256',
  tls_client_certificate_bound_access_tokens: client_id.endsWith('-bound'),
  client_secret: SECRET,
  grant_types: ['client_credentials'],
  redirect_uris: [],
  response_types: [],
  token_endpoint_auth_method: 'client_secret_basic',
}));

const signing = await jose.generateKeyPair('ES256', { extractable: true });
const kid = 'of-the-issuer';
const key = { ...(await jose.exportJWK(signing.privateKey)), kid, alg: 'ES256', use: 'sig' };
const holder = await jose.generateKeyPair('ES256', { extractable: true });
const holderJwk = await jose.exportJWK(holder.publicKey);

const server = createServer();
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
const issuer = `http://127.0.0.1:${server.address().port}`;

const provider = new Provider(issuer, {
  clients,
  jwks: { keys: [key] },
  scopes: ['ledger:read', 'ledger:write'],
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    introspection: { enabled: true, allowedPolicy: () => true },
    revocation: { enabled: true, allowedPolicy: () => true },
    dPoP: { enabled: true },
    mTLS: {
      enabled: true,
      certificateBoundAccessTokens: true,
      // The tests speak plain HTTP on loopback: the certificate is in a header.
      getCertificate: (ctx) => ctx.get('x-certificate') && decodeURIComponent(ctx.get('x-certificate')),
    },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => AUDIENCE,
      useGrantedResource: () => true,
      getResourceServerInfo: (ctx, resource, client) => ({
        scope: 'ledger:read ledger:write',
        audience: AUDIENCE,
        accessTokenTTL: 600,
        accessTokenFormat: client.clientId.startsWith('opaque') ? 'opaque' : 'jwt',
        jwt: { sign: { alg: 'ES256' } },
      }),
    },
  },
});
server.on('request', provider.callback());

const basic = (client) => `Basic ${Buffer.from(`${client}:${SECRET}`).toString('base64')}`;

async function proof({ method, url, nonce, token, changes = {}, header = {} }) {
  const claims = { jti: randomUUID(), htm: method, htu: url, iat: Math.floor(Date.now() / 1000), nonce };
  if (token) claims.ath = createHash('sha256').update(token).digest('base64url');
  const all = Object.fromEntries(Object.entries({ ...claims, ...changes }).filter(([, value]) => value != null));
  return new jose.SignJWT(all)
    .setProtectedHeader({ alg: 'ES256', typ: 'dpop+jwt', jwk: holderJwk, ...header })
    .sign(holder.privateKey);
}

async function post(path, client, form, headers = {}) {
  return fetch(`${issuer}${path}`, {
    method: 'POST',
    headers: { authorization: basic(client), 'content-type': 'application/x-www-form-urlencoded', ...headers },
    body: new URLSearchParams(form),
  });
}

const actions = {
  async ready() {
    return {
      issuer, audience: AUDIENCE, secret: SECRET,
      jwks_uri: `${issuer}/jwks`, introspection: `${issuer}/token/introspection`,
      jwks: await (await fetch(`${issuer}/jwks`)).json(),
    };
  },
  async token({ client = 'one', scope = 'ledger:write', certificate, dpop }) {
    const headers = {};
    if (certificate) headers['x-certificate'] = encodeURIComponent(certificate);
    if (dpop) headers.dpop = await proof({ method: 'POST', url: `${issuer}/token` });
    const answer = await post('/token', client, { grant_type: 'client_credentials', scope }, headers);
    return answer.json();
  },
  async revoke({ token, client = 'one' }) {
    return { ok: (await post('/token/revocation', client, { token })).ok };
  },
  async proof(asked) {
    return { proof: await proof(asked), key: await jose.exportPKCS8(holder.privateKey) };
  },
  async verify({ token, keys, issuer: of, audience }) {
    const { payload, protectedHeader } = await jose.jwtVerify(token, jose.createLocalJWKSet(keys), {
      issuer: of, audience, typ: 'at+jwt', algorithms: ['ES256'],
    });
    return { claims: payload, typ: protectedHeader.typ };
  },
  async jwt({ header = {}, claims = {} }) {
    const now = Math.floor(Date.now() / 1000);
    const all = {
      iss: issuer, sub: 'one', client_id: 'one', aud: AUDIENCE, scope: 'ledger:write',
      iat: now, exp: now + 600, jti: randomUUID(), ...claims,
    };
    for (const [name, value] of Object.entries(all)) if (value === null) delete all[name];
    const token = await new jose.SignJWT(all)
      .setProtectedHeader({ alg: 'ES256', typ: 'at+jwt', kid, ...header })
      .sign(signing.privateKey);
    return { token };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  let answer;
  try {
    answer = await actions[asked.do](asked);
  } catch (error) {
    answer = { error: String(error?.stack ?? error) };
  }
  console.log(JSON.stringify(answer));
}
process.exit(0);
