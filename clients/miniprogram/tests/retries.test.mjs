// What is repeated, when, how often, and what never is.
import assert from 'node:assert/strict'
import { test } from 'node:test'

import { ITEM, answer, expiredToken, createWx, fault, first, open, startProxy, until } from './wx.mjs'

const isAbout = part => request => request.url.includes(part)
const keys = proxy => proxy.requests.filter(({ method, url }) => method === 'POST' && url.includes('orders')).map(one => one.headers['idempotency-key'])
const codeOf = call => call.then(() => 200, error => error.code)

/** A client that is logged in, behind a proxy. */
async function ready(t, options) {
  const proxy = await startProxy(t)
  const client = open({ baseUrl: proxy.url, hurry: 100, ...options })
  await client.api.logIn()
  proxy.requests.length = 0
  client.waits.length = 0
  return { proxy, ...client }
}

const TROUBLE = {
  429: () => answer(429),
  503: () => answer(503),
  504: () => answer(504),
  'a connection that breaks before the service is reached': () => 'reset',
  'an answer that is lost': () => 'lose',
  'a 502 of a proxy': () => ({ status: 502, headers: { 'Content-Type': 'text/html' }, body: '<html>' }),
}
for (const [name, trouble] of Object.entries(TROUBLE)) {
  test(`${name}: reads and keyed writes are repeated, and done once`, async t => {
    const { proxy, api } = await ready(t)
    proxy.handle = first(2, isAbout('orders'), trouble)
    const order = await api.createOrder({ items: [ITEM] })
    assert.equal(new Set(keys(proxy)).size, 1)
    assert.equal(keys(proxy).length, 3)
    proxy.handle = first(2, isAbout('orders'), trouble)
    assert.equal((await api.listOrders()).total, 1)
    proxy.handle = first(2, isAbout('orders'), trouble)
    assert.equal((await api.getOrder({ order_id: order.id })).id, order.id)
  })

  test(`${name}: a PUT or DELETE is not repeated, as it may have been done`, async t => {
    const { proxy, api } = await ready(t)
    const { id: order_id } = await api.createOrder({ items: [ITEM] })
    for (const write of [() => api.updateOrder({ order_id, remark: '一' }), () => api.deleteOrder({ order_id })]) {
      const { version } = await api.getOrder({ order_id })
      assert.ok(version)
      proxy.requests.length = 0
      proxy.handle = first(1, isAbout('orders'), trouble)
      await assert.rejects(write(), error => error.retryable)
      assert.equal(proxy.requests.length, 1)
    }
  })
}

for (const errMsg of ['request:fail timeout', 'request:fail interrupted', 'request:fail errcode:-118 net::ERR_CONNECTION_TIMED_OUT']) {
  test(`WeChat says ${errMsg}: a read is repeated`, async t => {
    const { wx, api } = await ready(t)
    let left = 2
    wx.fault = () => (left-- > 0 ? errMsg : null)
    await api.getMe()
    assert.equal(left, -1)
    left = 1
    const code = /interrupted/.test(errMsg) ? 'NETWORK' : 'TIMEOUT'
    assert.equal(await codeOf(api.deleteUser({ user_id: 'me' })), code) // not repeated
  })
}

test('what will not change is not repeated', async t => {
  const { proxy, api } = await ready(t)
  for (const [status, code] of [[400, 400], [403, 403], [404, 404], [409, 409], [500, 500], [502, 520]]) {
    proxy.requests.length = 0
    proxy.handle = () => answer(status, {}, code)
    assert.equal(await codeOf(api.getMe()), code)
    assert.equal(proxy.requests.length, 1)
  }
})

test('five tries at most, each after a longer wait with jitter', async t => {
  const { proxy, api, waits } = await ready(t)
  proxy.handle = () => answer(503)
  const random = t.mock.method(Math, 'random', () => 0)
  assert.equal(await codeOf(api.getMe()), 503)
  assert.equal(proxy.requests.length, 5)
  assert.deepEqual(waits.filter(ms => ms < 20_000), [500, 1000, 2000, 4000])
  waits.length = 0
  random.mock.mockImplementation(() => 0.5)
  assert.equal(await codeOf(api.getMe()), 503)
  assert.deepEqual(waits.filter(ms => ms < 20_000), [750, 1500, 3000, 6000])
})

test('Retry-After is waited for, and more', async t => {
  const { proxy, api, waits } = await ready(t)
  for (const [name, status] of [['Retry-After', 429], ['retry-after', 503]]) {
    waits.length = 0
    proxy.handle = first(1, () => true, () => answer(status, { [name]: '7' }))
    await api.getMe()
    const [wait] = waits.filter(ms => ms < 20_000)
    assert.ok(wait >= 7500 && wait <= 8000, `${wait}`)
  }
})

test('a Retry-After beyond the deadline is not waited for', async t => {
  const { proxy, api } = await ready(t)
  proxy.handle = () => answer(503, { 'Retry-After': '31' })
  const began = Date.now()
  assert.equal(await codeOf(api.getMe()), 503)
  assert.ok(Date.now() - began < 15_000)
  assert.equal(proxy.requests.length, 1)
})

test('a Retry-After that is a date is as none', async t => {
  const { proxy, api, waits } = await ready(t)
  proxy.handle = first(1, () => true, () => answer(503, { 'Retry-After': 'Fri, 27 Nov 2026 15:00:00 GMT' }))
  await api.getMe()
  const [wait] = waits.filter(ms => !(ms > 20_000)) // but for the deadline
  assert.ok(wait >= 500 && wait <= 1000, `${wait}`)
})

test('40 retries a minute for all calls together', async t => {
  const { proxy, api, clock } = await ready(t)
  proxy.handle = () => answer(503)
  const call = () => codeOf(api.getMe())
  await Promise.all(Array.from({ length: 20 }, call))
  assert.equal(proxy.requests.length, 20 + 40)
  await call()
  assert.equal(proxy.requests.length, 61)
  clock.ahead = 61_000
  await call()
  assert.equal(proxy.requests.length, 66)
})

test('calls that were cancelled count as no retry', async t => {
  const { wx, proxy, api } = await ready(t)
  wx.fault = () => 'hangs'
  wx.requests.length = 0
  for (let i = 1; i <= 40; i++) {
    const controller = new AbortController()
    const call = codeOf(api.getMe({}, { signal: controller.signal }))
    await until(() => wx.requests.length === i)
    controller.abort()
    assert.equal(await call, 'ABORTED')
  }
  wx.fault = () => null
  proxy.handle = first(1, () => true, () => answer(503))
  assert.equal(await codeOf(api.getMe()), 200)
})

test('a request that gets no answer leaves time for another one', async t => {
  const { wx, api } = open()
  await api.logIn()
  let left = 1
  wx.fault = () => (left-- > 0 ? 'hangs' : null)
  const began = Date.now()
  await api.getMe({}, { timeout: 12_000 })
  assert.ok(Date.now() - began >= 5900)
  assert.equal(left, -1)
})

test('a keyed write has one key, over retries and over a new login; each call has another', async t => {
  const wx = createWx()
  wx.storage.set('kuaishang', await expiredToken(wx.openid))
  const proxy = await startProxy(t)
  const { api } = open({ wx, baseUrl: proxy.url, hurry: 100 })
  proxy.handle = first(1, isAbout('orders'), () => 'reset')
  await api.createOrder({ items: [ITEM] }) // reset, 401, login, done
  assert.equal(keys(proxy).length, 3)
  assert.equal(new Set(keys(proxy)).size, 1)
  assert.match(keys(proxy)[0], /^[!-~]{20,255}$/)
  await api.createOrder({ items: [ITEM] })
  await api.request({ method: 'POST', path: '/api/v1/orders', body: { items: [ITEM] } })
  assert.equal(new Set(keys(proxy)).size, 3)
  assert.equal((await api.listOrders()).total, 3)
})

test("the app's own key makes two calls one", async () => {
  const { api } = open()
  const [one, other] = [await api.createOrder({ items: [ITEM] }, { idempotencyKey: 'mine' }), await api.createOrder({ items: [ITEM] }, { idempotencyKey: 'mine' })]
  assert.equal(one.id, other.id)
})

test('a retry sends what was given, whatever became of it since', async t => {
  const { proxy, api } = await ready(t)
  const body = { items: [{ ...ITEM }], remark: '一' }
  let order
  proxy.handle = first(1, isAbout('orders'), () => {
    body.remark = '二'
    body.items[0].quantity = 99
    return 'lose'
  })
  order = await api.createOrder(body)
  assert.deepEqual([order.remark, order.items[0].quantity], ['一', 2])
})

test('WeChat is busy, then slow: the login is repeated until it succeeds', async () => {
  const { wx, api } = open({ hurry: 10 })
  await fault('errcode', { errcode: -1, times: 2 }) // the service asks twice itself, then says 503
  await api.getMe()
  assert.equal(wx.logins, 1)
})
