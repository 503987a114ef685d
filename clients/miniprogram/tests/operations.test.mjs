// The client's operations are those of openapi.json, and the file is what a mini-program can take.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'

import { ITEM, open } from './wx.mjs'

const FILE = new URL('../kuaishang.js', import.meta.url)
const { paths, components } = JSON.parse(readFileSync(new URL('../../../openapi.json', import.meta.url)))
const OPERATIONS = 26 // without resources of your own
const NOT_FOR_MINI_PROGRAMS = ['beginWebLogin', 'completeWebLogin', 'verifyMessageUrl', 'receiveMessage']

const operations = Object.entries(paths).flatMap(([path, item]) =>
  Object.entries(item)
    .filter(([method]) => ['get', 'post', 'put', 'delete'].includes(method))
    .map(([method, { operationId: id, parameters = [] }]) => ({
      id,
      path,
      method: method.toUpperCase(),
      parameters: [...parameters, ...(item.parameters ?? [])].map(one => components.parameters?.[one.$ref?.split('/').pop()] ?? one),
    }))
    .filter(({ id }) => path.startsWith('/api/v1/') && !NOT_FOR_MINI_PROGRAMS.includes(id)),
)
const named = (place, parameters) => parameters.filter(one => one.in === place).map(one => one.name)

/** The one request that a call makes, on a phone that answers everything itself. */
async function requestOf(makeCall) {
  const { wx, api } = open({ wx: answering() })
  await makeCall(api)
  assert.equal(wx.requests.length, 1)
  return wx.requests[0]
}

function answering() {
  const ignore = () => {}
  const requests = []
  return {
    requests,
    getStorageSync: () => 'a-token',
    setStorageSync: ignore,
    removeStorageSync: ignore,
    getNetworkType: ({ success }) => success({ networkType: 'wifi' }),
    onNetworkStatusChange: ignore,
    onAppShow: ignore,
    onAppHide: ignore,
    request(options) {
      requests.push(options)
      setImmediate(() => {
        options.success({ statusCode: 200, header: {}, data: { code: 200, message: '', data: {} } })
        options.complete()
      })
      return { abort: ignore }
    },
  }
}

test('each operation for mini-programs is a function, and nothing else is', () => {
  const { api } = open({ wx: answering() })
  assert.ok(operations.length > 20)
  assert.deepEqual(Object.keys(api).sort(), [...operations.map(one => one.id), 'getMe', 'request'].sort())
})

for (const { id, method, path, parameters } of operations.filter(one => one.id !== 'logIn')) {
  test(`${id}: ${method} ${path}`, async () => {
    const inPath = Object.fromEntries(named('path', parameters).map((name, i) => [name, `${i + 1}/?`]))
    const inQuery = Object.fromEntries(named('query', parameters).map(name => [name, `a&b ${name}`]))
    const body = ['POST', 'PUT'].includes(method) ? { field: '值' } : {}
    const request = await requestOf(api => api[id]({ ...inPath, ...inQuery, ...body }, { version: 7 }))
    const url = new URL(request.url)
    const expected = path.replace(/{(\w+)}/g, (_, name) => encodeURIComponent(inPath[name]))
    assert.equal(request.method, method)
    assert.equal(url.pathname, expected)
    assert.deepEqual(Object.fromEntries(url.searchParams), inQuery)
    assert.deepEqual(request.data && JSON.parse(request.data), Object.keys(body).length ? body : undefined)
    const headers = ['Idempotency-Key', 'If-Match'].filter(name => name.toLowerCase() in request.header)
    assert.deepEqual(headers, named('header', parameters).filter(name => name !== 'If-None-Match'))
    if (headers.includes('If-Match')) assert.equal(request.header['if-match'], '"7"')
    assert.equal(request.header.authorization, 'Bearer a-token')
  })
}

test('what is not given is not in the query', async () => {
  const request = await requestOf(api => api.listOrders({ page: 2, after: undefined, status: null }))
  assert.equal(new URL(request.url).search, '?page=2')
})

test('getMe and request() against the service, with the file as a mini-program requires it', async () => {
  const { wx } = open()
  globalThis.wx = wx
  const { createClient } = createRequire(import.meta.url)(fileURLToPath(FILE))
  const api = createClient({ baseUrl: process.env.SERVICE_URL, storageKey: 'other' })
  const me = await api.getMe()
  assert.deepEqual(await api.request({ path: '/api/v1/users/me', headers: { 'Accept-Language': 'en' } }), me)
  const order = await api.request({ method: 'POST', path: '/api/v1/orders', body: { items: [ITEM] } })
  assert.equal(order.total, 2400)
  assert.deepEqual([...wx.storage.keys()], ['other'])
})

test('the file is under 10 KB, beside the lines for resources of your own', () => {
  const added = operations.length - OPERATIONS
  assert.ok(readFileSync(FILE).length < 10_240 + 60 * added)
})

test('the file has no syntax newer than ES2018', t => {
  const script = `require('internal/deps/acorn/acorn/dist/acorn').parse(require('fs').readFileSync(process.argv[1], 'utf8'),
    { ecmaVersion: Number(process.argv[2]) || 'latest' })`
  const parse = version =>
    execFileSync(process.execPath, ['--expose-internals', '-e', script, fileURLToPath(FILE), version], { stdio: 'pipe' })
  try {
    parse('latest')
  } catch (error) {
    return t.skip(`this node has no parser of its own: ${error.message}`)
  }
  parse('2018')
  assert.throws(() => parse('2015'), /SyntaxError/)
})
