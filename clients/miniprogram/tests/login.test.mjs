// Logging in: once, however many ask.
import assert from 'node:assert/strict'
import { test } from 'node:test'

import { ITEM, answer, burn, control, createWx, exchanges, expiredToken, fault, first, open, startProxy, until } from './wx.mjs'

const KEY = 'kuaishang'
const isLogin = request => request.url === '/api/v1/auth/wechat' && request.method === 'POST'
const settled = async calls => (await Promise.allSettled(calls)).map(call => call.reason?.code ?? call.status)
const times = (count, make) => Array.from({ length: count }, (_, i) => make(i))

test('50 calls at a cold start: one wx.login, one exchange', async () => {
  const { wx, api } = open()
  const before = await exchanges()
  const users = await Promise.all(times(50, () => api.getMe()))
  assert.equal(new Set(users.map(user => user.id)).size, 1)
  assert.equal(wx.logins, 1)
  assert.equal((await exchanges()) - before, 1)
  assert.equal(wx.requests.length, 51)
})

test('the token is stored, and used again', async () => {
  const { wx, api } = open()
  const user = await api.logIn()
  assert.match(wx.storage.get(KEY), /^[\w-]{20,}$/)
  const later = open({ wx: createWx({ openid: wx.openid, storage: wx.storage }) })
  assert.equal((await later.api.logIn()).id, user.id)
  assert.equal((await later.api.getMe()).id, user.id)
  assert.equal(later.wx.logins, 0)
})

test('ten calls with an expired token: one wx.login, ten answers', async () => {
  const wx = createWx()
  const expired = await expiredToken(wx.openid)
  wx.storage.set(KEY, expired)
  const { api } = open({ wx })
  const before = await exchanges()
  const users = await Promise.all(times(10, () => api.getMe()))
  assert.equal(users.length, 10)
  assert.equal(wx.logins, 1)
  // What waited for a place meanwhile was not sent without a token.
  const tokens = new Set(wx.requests.map(request => request.header.authorization))
  assert.deepEqual([...tokens], [`Bearer ${expired}`, undefined, `Bearer ${wx.storage.get(KEY)}`])
  assert.equal((await exchanges()) - before, 1)
})

test('the same with the service restarted and WeChat slow in between', async () => {
  const wx = createWx()
  wx.storage.set(KEY, await expiredToken(wx.openid))
  const { api } = open({ wx, timeout: 120_000, hurry: 0.3 }) // a busy machine takes long to start it
  await fault('slow', { seconds: 2 })
  const before = await exchanges()
  let restarted
  wx.beforeLogin = async () => {
    await control('stop')
    restarted = control('start') // in the meantime connections are refused
  }
  const orders = await Promise.all(times(10, i => api.createOrder({ remark: `${i}`, items: [ITEM] })))
  await restarted
  assert.deepEqual(orders.map(order => order.remark), times(10, String))
  assert.equal(wx.logins, 1)
  assert.equal((await exchanges()) - before, 1)
  assert.equal((await api.listOrders()).total, 10)
})

test('a login whose answer is lost is repeated with the same code', async t => {
  const proxy = await startProxy(t)
  proxy.handle = first(1, isLogin, () => 'lose')
  const { wx, api } = open({ baseUrl: proxy.url, hurry: 50 })
  const before = await exchanges()
  await api.getMe()
  assert.equal(wx.logins, 1)
  assert.equal((await exchanges()) - before, 1)
  const codes = proxy.requests.filter(isLogin).map(request => request.body)
  assert.equal(codes.length, 2)
  assert.equal(codes[0], codes[1])
})

test('a code that was used already is replaced once', async () => {
  const wx = createWx()
  const { makeCode } = wx
  const used = await makeCode()
  await burn(used)
  wx.makeCode = () => (wx.logins === 1 ? used : makeCode())
  const { api } = open({ wx })
  await api.getMe()
  assert.equal(wx.logins, 2)
})

test('a code that is refused twice is an error', async () => {
  const wx = createWx()
  wx.makeCode = async () => `0${Math.random()}`.replace('.', '')
  const { api } = open({ wx })
  assert.deepEqual(await settled([api.getMe()]), [460])
  assert.equal(wx.logins, 2)
})

test('a late 401 of an earlier token does not log in again', async t => {
  const proxy = await startProxy(t)
  const wx = createWx()
  wx.storage.set(KEY, await expiredToken(wx.openid))
  const { api } = open({ wx, baseUrl: proxy.url })
  let letGo
  const held = new Promise(resolve => (letGo = resolve))
  proxy.handle = first(1, request => request.url.includes('orders'), () => held.then(() => answer(401)))
  const late = api.listOrders()
  await until(() => proxy.requests.length === 1)
  await api.getMe()
  assert.equal(wx.logins, 1)
  letGo()
  assert.equal((await late).total, 0)
  assert.equal(wx.logins, 1)
})

test('a second 401 is an error, not another login', async t => {
  const proxy = await startProxy(t)
  proxy.handle = request => (isLogin(request) ? undefined : answer(401))
  const { wx, api, ApiError } = open({ baseUrl: proxy.url })
  await assert.rejects(api.getMe(), error => error instanceof ApiError && error.code === 401 && !error.retryable)
  assert.equal(wx.requests.length, 4) // two logins, two calls
  assert.equal(wx.logins, 2)
})

test('a login that fails rejects all that wait, and the next call tries again', async () => {
  const { wx, api } = open()
  wx.beforeLogin = async () => {
    throw new Error('system error')
  }
  assert.deepEqual(await settled(times(20, () => api.getMe())), times(20, () => 'NETWORK'))
  assert.equal(wx.logins, 1)
  wx.beforeLogin = async () => {}
  assert.deepEqual(await settled(times(20, () => api.getMe())), times(20, () => 'fulfilled'))
  assert.equal(wx.logins, 2)
})

test('a login that the service refuses rejects all that wait', async t => {
  const proxy = await startProxy(t)
  proxy.handle = first(1, isLogin, () => answer(403))
  const { wx, api } = open({ baseUrl: proxy.url })
  assert.deepEqual(await settled(times(20, () => api.getMe())), times(20, () => 403))
  await api.getMe()
  assert.equal(wx.logins, 2)
})

test('a wx.login that never answers ends with the deadline, and the next call tries again', async () => {
  const { wx, api } = open({ timeout: 3000 })
  wx.beforeLogin = () => new Promise(() => {})
  assert.deepEqual(await settled(times(3, () => api.getMe())), times(3, () => 'TIMEOUT'))
  wx.beforeLogin = async () => {}
  await api.getMe({}, { timeout: 30_000 })
  assert.equal(wx.logins, 2)
})

test('at most three logins a minute', async () => {
  const { wx, api, clock } = open()
  wx.beforeLogin = async () => {
    throw new Error('system error')
  }
  const codes = []
  for (let i = 0; i < 5; i++) codes.push(...(await settled([api.getMe()])))
  assert.deepEqual(codes, ['NETWORK', 'NETWORK', 'NETWORK', 'LOGIN_LIMIT', 'LOGIN_LIMIT'])
  assert.equal(wx.logins, 3)
  wx.beforeLogin = async () => {}
  clock.ahead = 59_000
  assert.deepEqual(await settled([api.getMe()]), ['LOGIN_LIMIT'])
  clock.ahead = 61_000
  await api.getMe()
  assert.equal(wx.logins, 4)
})

test('logging out forgets the token; the next call logs in again', async () => {
  const { wx, api } = open()
  for (const logOut of [api.logOut, api.logOutEverywhere]) {
    await api.logIn()
    const token = wx.storage.get(KEY)
    await logOut()
    assert.equal(wx.storage.has(KEY), false)
    await api.getMe()
    assert.notEqual(wx.storage.get(KEY), token)
  }
  assert.equal(wx.logins, 3)
})

test('the token is in no URL', async () => {
  const { wx, api } = open()
  await api.getMe()
  await api.listOrders({ page: 1, status: undefined })
  await api.request({ path: '@example.com/api/v1/users/me' }).catch(() => {})
  const token = wx.storage.get(KEY)
  const { host } = new URL(process.env.SERVICE_URL)
  for (const { url } of wx.requests) {
    assert.equal(new URL(url).host, host)
    assert.equal(url.includes(token), false)
  }
})

test('without storage the token lives in memory', async () => {
  const wx = createWx()
  wx.getStorageSync = wx.setStorageSync = () => {
    throw new Error('storage:fail')
  }
  const { api } = open({ wx })
  await api.getMe()
  await api.getMe()
  assert.equal(wx.logins, 1)
})
