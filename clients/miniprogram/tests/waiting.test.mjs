// Deadlines, cancelling, the queue, the background, and no network.
import assert from 'node:assert/strict'
import { getEventListeners } from 'node:events'
import { test } from 'node:test'

import { ITEM, answer, createWx, first, open, startProxy, until } from './wx.mjs'

const times = (count, make) => Array.from({ length: count }, (_, i) => make(i))
const outcome = async call => {
  const began = Date.now()
  const code = await call.then(() => 'ok', error => error.code)
  return { code, ms: Date.now() - began }
}
const pause = ms => new Promise(resolve => setTimeout(resolve, ms))

/** A client that is logged in, whose requests hang as long as `wx.holds` says so. */
async function ready(options) {
  const client = open(options)
  await client.api.logIn()
  const { wx } = client
  wx.requests.length = wx.most = 0
  wx.holds = () => false
  const released = new Set()
  wx.fault = async request => {
    if (wx.holds(request)) await new Promise(resolve => released.add(resolve))
    return null
  }
  wx.letGo = () => {
    wx.holds = () => false
    released.forEach(resolve => resolve())
  }
  return client
}

test('a call that gets no answer fails with TIMEOUT at its deadline', async () => {
  const { wx, api, ApiError } = await ready()
  wx.holds = () => true
  const error = await api.getMe({}, { timeout: 600 }).catch(error => error)
  assert.ok(error instanceof ApiError)
  assert.deepEqual([error.code, error.status, error.retryable], ['TIMEOUT', 0, true])
  const { code, ms } = await outcome(api.updateUser({ user_id: 'me', nickname: '上' }, { timeout: 600 }))
  assert.equal(code, 'TIMEOUT')
  assert.ok(ms >= 500 && ms < 10_000, `${ms} ms`)
})

test('so it does, and aborts its request, if WeChat does not end it in time', async () => {
  const { wx, api } = await ready()
  const { request } = wx
  wx.request = ({ timeout, ...options }) => request(options)
  wx.holds = () => true
  const calls = await Promise.all([api.getMe({}, { timeout: 600 }), api.deleteOrder({ order_id: 1 }, { timeout: 600 })].map(outcome))
  assert.deepEqual(calls.map(one => one.code), ['TIMEOUT', 'TIMEOUT'])
  assert.ok(calls.every(({ ms }) => ms >= 500 && ms < 10_000))
  assert.equal(wx.aborts, 2)
})

test("the client's own timeout is the deadline of each call", async () => {
  const { wx, api } = await ready({ timeout: 3000 })
  wx.holds = () => true
  const { code, ms } = await outcome(api.listOrders())
  assert.equal(code, 'TIMEOUT')
  assert.ok(ms >= 2900 && ms < 10_000, `${ms} ms`)
})

test('the deadline includes retries', async t => {
  const proxy = await startProxy(t)
  const { api } = open({ baseUrl: proxy.url })
  await api.logIn()
  proxy.handle = async () => {
    await pause(300)
    return answer(503)
  }
  const { code, ms } = await outcome(api.getMe({}, { timeout: 1200 }))
  assert.ok([503, 'TIMEOUT'].includes(code))
  assert.ok(ms < 10_000, `${ms} ms`)
})

test('the deadline includes the wait for a place, and a request that is late is never sent', async () => {
  const { wx, api } = await ready()
  wx.holds = () => true
  const running = times(6, () => api.listOrders())
  await until(() => wx.requests.length === 6)
  const { code, ms } = await outcome(api.createOrder({ items: [ITEM] }, { timeout: 500 }))
  assert.equal(code, 'TIMEOUT')
  assert.ok(ms >= 400 && ms < 10_000, `${ms} ms`)
  wx.letGo()
  await Promise.all(running)
  assert.equal((await api.listOrders()).total, 0)
  assert.equal(wx.requests.filter(request => request.method === 'POST').length, 0)
})

test('the deadline includes the wait for a login', async () => {
  const { wx, api } = open()
  let login
  wx.beforeLogin = () => new Promise(resolve => (login = resolve))
  const { code } = await outcome(api.getMe({}, { timeout: 400 }))
  assert.equal(code, 'TIMEOUT')
  login() // it serves the next call
  await api.getMe()
  assert.equal(wx.logins, 1)
})

for (const [kind, makeSignal] of Object.entries({
  'an AbortController': () => {
    const controller = new AbortController()
    return { signal: controller.signal, abort: () => controller.abort() }
  },
  'an object with onabort': () => {
    const signal = { aborted: false, onabort: null }
    return { signal, abort: () => ((signal.aborted = true), signal.onabort?.()) }
  },
})) {
  test(`${kind} aborts the request`, async () => {
    const { wx, api } = await ready()
    wx.holds = () => true
    const { signal, abort } = makeSignal()
    const calls = times(3, () => outcome(api.listOrders({}, { signal })))
    await until(() => wx.requests.length === 3)
    abort()
    assert.deepEqual((await Promise.all(calls)).map(one => one.code), times(3, () => 'ABORTED'))
    assert.equal(wx.aborts, 3)
    wx.letGo()
    assert.equal((await api.listOrders()).total, 0) // their places are free
  })

  test(`${kind} that is aborted already sends nothing`, async () => {
    const { wx, api } = await ready()
    const { signal, abort } = makeSignal()
    abort()
    assert.equal((await outcome(api.listOrders({}, { signal }))).code, 'ABORTED')
    await api.getMe()
    assert.equal(wx.requests.length, 1)
  })

  test(`${kind} cancels a call that waits for a place, for a login, or to be repeated`, async t => {
    const proxy = await startProxy(t)
    const { wx, api } = await ready({ baseUrl: proxy.url })
    wx.holds = () => true
    const running = times(6, () => api.listOrders())
    const { signal, abort } = makeSignal()
    const queued = outcome(api.createOrder({ items: [ITEM] }, { signal }))
    await until(() => wx.requests.length === 6)
    abort()
    assert.equal((await queued).code, 'ABORTED')
    wx.letGo()
    await Promise.all(running)

    const again = makeSignal()
    proxy.handle = () => answer(503)
    const repeated = outcome(api.request({ path: '/api/v1/orders', signal: again.signal }))
    await until(() => proxy.requests.length > 7)
    again.abort()
    assert.equal((await repeated).code, 'ABORTED')
    proxy.handle = async () => {}
    await pause(1500) // when it would have been repeated
    assert.equal(proxy.requests.length, 8)

    const cold = open()
    let login
    cold.wx.beforeLogin = () => new Promise(resolve => (login = resolve))
    const last = makeSignal()
    const waiting = outcome(cold.api.getMe({}, { signal: last.signal }))
    await until(() => login)
    last.abort()
    assert.equal((await waiting).code, 'ABORTED')
    login()
    await cold.api.getMe()
    assert.equal(cold.wx.logins, 1)
  })
}

test("a signal's own onabort is kept", async () => {
  const { wx, api } = await ready()
  wx.holds = () => true
  let own = 0
  const signal = { aborted: false, onabort: () => own++ }
  const call = outcome(api.getMe({}, { signal }))
  await until(() => wx.requests.length === 1)
  signal.onabort()
  assert.equal((await call).code, 'ABORTED')
  assert.equal(own, 1)
})

test('a signal without listeners is as it was after each call', async () => {
  const { wx, api } = await ready()
  for (const own of [null, () => {}]) {
    const signal = { aborted: false, onabort: own }
    for (let i = 0; i < 3; i++) await api.getMe({}, { signal })
    assert.equal(signal.onabort, own)
  }
  const later = () => {}
  const signal = { aborted: false, onabort: null }
  const call = api.getMe({}, { signal })
  signal.onabort = later // of the caller's
  await call
  assert.equal(signal.onabort, later)
  assert.equal(wx.aborts, 0)
})

test('a signal of a call that is over aborts nothing', async () => {
  const { wx, api } = await ready()
  const controller = new AbortController()
  await api.getMe({}, { signal: controller.signal })
  controller.abort()
  assert.equal(wx.aborts, 0)
  assert.equal(getEventListeners(controller.signal, 'abort').length, 0)
})

test('six usual requests at once, eight with those that have priority', async () => {
  const { wx, api } = await ready()
  wx.holds = () => true
  const usual = times(20, () => api.listOrders())
  await until(() => wx.most === 6)
  const urgent = times(3, () => api.createOrder({ items: [ITEM] }, { priority: true }))
  await until(() => wx.most === 8)
  await pause(50)
  assert.equal(wx.requests.length, 8)
  assert.deepEqual(wx.requests.map(one => one.method), [...times(6, () => 'GET'), 'POST', 'POST'])
  wx.letGo()
  await Promise.all([...usual, ...urgent])
  assert.equal(wx.most, 8)
  assert.deepEqual(wx.requests.slice(8, 9).map(one => one.method), ['POST']) // before those that came earlier
  assert.equal(wx.requests.length, 23)
})

test('priority and a login find a place where all others are taken', async () => {
  const { wx, api } = await ready()
  wx.holds = request => request.method === 'GET'
  const usual = times(20, () => api.listOrders())
  await until(() => wx.most === 6)
  assert.equal((await outcome(api.createOrder({ items: [ITEM] }, { priority: true, timeout: 10_000 }))).code, 'ok')
  wx.sessionIsValid = false
  const data = { encryptedData: '', iv: '', rawData: '', signature: '' }
  const stale = await outcome(api.setProfile(data, { timeout: 10_000 })) // before WeChat ends the others
  assert.equal(stale.code, 463)
  assert.equal(wx.logins, 2)
  wx.letGo()
  assert.deepEqual(await Promise.all(usual.map(outcome)).then(found => new Set(found.map(one => one.code))), new Set(['ok']))
})

test('eight calls with priority and an expired token do not keep the login out', async () => {
  const wx = createWx()
  wx.storage.set('kuaishang', 'expired')
  const { api } = open({ wx, timeout: 20_000 })
  await Promise.all(times(30, () => api.listOrders({}, { priority: true })))
  assert.equal(wx.logins, 1)
  assert.equal(wx.most, 8)
})

test('a place is free again after each kind of end', async t => {
  const proxy = await startProxy(t)
  const { wx, api } = await ready({ baseUrl: proxy.url, hurry: 100 })
  proxy.handle = first(20, () => true, () => 'reset')
  await Promise.allSettled(times(20, () => api.deleteOrder({ order_id: 1 }, { version: 1 })))
  proxy.handle = first(20, () => true, () => answer(500))
  await Promise.allSettled(times(20, () => api.listOrders()))
  proxy.handle = async () => {}
  wx.holds = () => true
  await Promise.allSettled(times(20, () => api.listOrders({}, { timeout: 100 })))
  wx.holds = () => true
  const running = times(6, () => api.listOrders())
  await Promise.allSettled(times(20, () => api.listOrders({}, { timeout: 100 }))) // they never had a place
  wx.letGo()
  await Promise.all(running)
  wx.most = 0
  await Promise.all(times(20, () => api.listOrders()))
  assert.equal(wx.most, 6)
})

test('a call in the background waits for the foreground, beyond its deadline', async () => {
  const { wx, api } = await ready()
  wx.hide()
  const calls = [api.getMe({}, { timeout: 3000 }), api.createOrder({ items: [ITEM] }, { timeout: 3000 })]
  calls.push(api.updateUser({ user_id: 'me', nickname: '上' }, { timeout: 3000 }))
  const all = Promise.all(calls.map(outcome))
  await pause(3300)
  assert.equal(wx.requests.length, 0)
  wx.show()
  assert.deepEqual((await all).map(one => one.code), ['ok', 'ok', 'ok'])
  assert.equal(wx.requests.length, 3)
})

test('a call that was cancelled in the background logs nobody in', async () => {
  const { wx, api } = open()
  wx.hide()
  const controller = new AbortController()
  const call = outcome(api.getMe({}, { signal: controller.signal }))
  controller.abort()
  assert.equal((await call).code, 'ABORTED')
  wx.show()
  await pause(500)
  assert.equal(wx.logins, 0)
})

test('what WeChat interrupts in the background is resumed in the foreground, and done once', async () => {
  const { wx, api } = await ready()
  wx.holds = () => true
  const calls = Promise.all([api.getMe(), api.createOrder({ items: [ITEM] })].map(outcome))
  await until(() => wx.requests.length === 2)
  wx.hide()
  await pause(1500) // WeChat has interrupted them, and the wait for the retry is over
  assert.equal(wx.requests.length, 2)
  wx.letGo()
  wx.show()
  assert.deepEqual((await calls).map(one => one.code), ['ok', 'ok'])
  assert.equal(wx.requests.length, 4)
  assert.equal((await api.listOrders()).total, 1)
})

test('a call that waits for a place when the user leaves is sent in the foreground', async () => {
  const { wx, api } = await ready()
  wx.holds = () => true
  const calls = Promise.all(times(8, () => outcome(api.listOrders())))
  await until(() => wx.requests.length === 6)
  wx.hide()
  await pause(300)
  assert.equal(wx.requests.filter(one => one.inBackground).length, 0)
  wx.letGo()
  wx.show()
  assert.deepEqual((await calls).map(one => one.code), times(8, () => 'ok'))
})

test('no deadline passes in the background, and it goes on in the foreground', async () => {
  const { wx, api } = await ready()
  wx.holds = () => true
  let is = 'waiting'
  const call = outcome(api.getMe({}, { timeout: 600 })).then(found => ((is = 'over'), found))
  await until(() => wx.requests.length === 1)
  wx.hide()
  await pause(1500)
  assert.equal(is, 'waiting')
  wx.show()
  const shown = Date.now()
  assert.equal((await call).code, 'TIMEOUT')
  assert.ok(Date.now() - shown < 10_000)
})

test('a call that starts without a network fails at once with OFFLINE', async () => {
  const { wx, api } = await ready()
  wx.setNetwork('none')
  const { code, ms } = await outcome(api.getMe())
  assert.equal(code, 'OFFLINE')
  assert.ok(ms < 10_000)
  assert.equal(wx.requests.length, 0)
  wx.setNetwork('4g')
  await api.getMe()
})

test('OFFLINE is retryable, and known from the start', async () => {
  const wx = createWx()
  wx.setNetwork('none', { tells: false })
  const { api } = open({ wx })
  await until(() => wx.asked) // what network there is
  const error = await api.logIn().catch(error => error)
  assert.deepEqual([error.code, error.retryable, wx.requests.length], ['OFFLINE', true, 0])
})

test('a call that loses the network underway goes on when it is back', async () => {
  const { wx, api } = await ready({ hurry: 100 })
  wx.holds = () => true
  const call = outcome(api.createOrder({ items: [ITEM] }))
  await until(() => wx.requests.length === 1)
  wx.setNetwork('none')
  await pause(300)
  assert.equal(wx.requests.length, 1)
  wx.letGo()
  wx.setNetwork('wifi')
  assert.equal((await call).code, 'ok')
})

test('if the network does not come back, that is OFFLINE at the deadline', async () => {
  const { wx, api } = await ready({ hurry: 100 })
  wx.holds = () => true
  const call = outcome(api.getMe({}, { timeout: 600 }))
  await until(() => wx.requests.length === 1)
  wx.setNetwork('none')
  const { code, ms } = await call
  assert.equal(code, 'OFFLINE')
  assert.ok(ms >= 500 && ms < 10_000, `${ms} ms`)
})

test('so it does when the network is back from the background, unnoticed', async () => {
  const { wx, api } = await ready({ hurry: 100 })
  wx.holds = () => true
  const call = outcome(api.createOrder({ items: [ITEM] }, { timeout: 10_000 }))
  await until(() => wx.requests.length === 1)
  wx.setNetwork('none')
  await pause(300) // it waits for the network
  wx.hide()
  wx.setNetwork('wifi', { tells: false })
  wx.letGo()
  wx.show()
  assert.equal((await call).code, 'ok')
})

test('a network that came back unnoticed is noticed', async () => {
  const { wx, api } = await ready()
  wx.setNetwork('none')
  wx.setNetwork('wifi', { tells: false })
  await api.getMe()
})
