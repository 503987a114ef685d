// What a call returns, what it throws, and which version a write names.
import assert from 'node:assert/strict'
import { test } from 'node:test'

import { ITEM, answer, createWx, fault, first, open, simulator, startProxy } from './wx.mjs'

const headersOf = wx => Object.entries(wx.requests[wx.requests.length - 1].header).map(([name, value]) => [name.toLowerCase(), value])
const headerOf = (wx, name) => Object.fromEntries(headersOf(wx))[name.toLowerCase()]
const caught = async call => {
  try {
    await call
  } catch (error) {
    return error
  }
  throw new Error('did not fail')
}

test('a success is the data of the envelope', async () => {
  const { api } = open()
  const order = await api.createOrder({ items: [ITEM], remark: '少糖' })
  assert.deepEqual([order.total, order.remark, order.items[0].name], [2400, '少糖', '龙井'])
  const { version, ...read } = await api.getOrder({ order_id: order.id })
  assert.deepEqual({ ...read, version }, order)
  const page = await api.listOrders({ page: 1, page_size: 5 })
  assert.deepEqual([page.total, page.page_size, page.items[0].id], [1, 5, order.id])
  assert.deepEqual(await api.deleteOrder({ order_id: order.id }), {})
  assert.equal((await api.exportPersonalData()).orders.length, 0)
})

test('a failure is an ApiError with all that the service says', async () => {
  const { wx, api, ApiError, ConflictError, StaleDataError } = open()
  const invalid = await caught(api.createOrder({ items: [] }))
  assert.ok(invalid instanceof ApiError && invalid instanceof Error)
  assert.ok(!(invalid instanceof ConflictError) && !(invalid instanceof StaleDataError))
  assert.deepEqual([invalid.code, invalid.status, invalid.retryable], [400, 400, false])
  assert.match(invalid.message, /参数/)
  assert.match(invalid.traceId, /^[0-9a-f]{32}$/)
  assert.deepEqual(Object.keys(invalid.data.errors), ['items'])
  const missing = await caught(api.getOrder({ order_id: 999_999 }))
  assert.deepEqual([missing.code, missing.status, missing.data], [404, 404, null])
  const key = 'the-same-key'
  await api.createOrder({ items: [ITEM] }, { idempotencyKey: key })
  const reused = await caught(api.createOrder({ items: [ITEM, ITEM] }, { idempotencyKey: key }))
  assert.deepEqual([reused.code, reused.status], [465, 409])
  assert.equal(wx.logins, 1)
})

test('retryable says whether the same may succeed later', async t => {
  const proxy = await startProxy(t)
  const { wx, api } = open({ baseUrl: proxy.url })
  const user = await api.getMe()
  const found = {}
  for (const [status, code] of [[400, 400], [403, 462], [404, 404], [409, 409], [429, 429], [500, 500], [502, 502], [502, 520], [503, 503], [504, 504]]) {
    proxy.handle = () => answer(status, {}, code)
    const error = await caught(api.deleteUser({ user_id: 'me' }, { version: user.version }))
    assert.deepEqual([error.code, error.status, error.message, error.traceId], [code, status, `code ${code}`, 'f'.repeat(32)])
    found[code] = error.retryable
  }
  wx.fault = () => 'request:fail url not in domain list'
  const network = await caught(api.deleteUser({ user_id: 'me' }, { version: user.version }))
  assert.deepEqual([network.code, network.status, network.traceId], ['NETWORK', 0, ''])
  assert.equal(network.data.errMsg, 'request:fail url not in domain list')
  found.NETWORK = network.retryable
  const retryable = Object.keys(found).filter(code => found[code])
  assert.deepEqual(retryable, ['429', '503', '504', 'NETWORK'])
})

test('header names are read in any case', async t => {
  const proxy = await startProxy(t)
  const { api } = open({ baseUrl: proxy.url })
  await api.getMe()
  for (const name of ['x-trace-id', 'X-TRACE-ID', 'X-Trace-Id']) {
    proxy.handle = () => ({ ...answer(404), headers: { 'Content-Type': 'application/json', [name]: 'a'.repeat(32) } })
    assert.equal((await caught(api.getMe())).traceId, 'a'.repeat(32))
  }
})

test('what a proxy answers without an envelope is an ApiError, too', async t => {
  const proxy = await startProxy(t)
  const { api, ApiError } = open({ baseUrl: proxy.url })
  const user = await api.getMe()
  const headers = { 'Content-Type': 'text/html' }
  for (const [status, code] of [[502, 'NETWORK'], [413, 413], [200, 'NETWORK']]) {
    proxy.handle = () => ({ status, headers, body: '<html>nginx</html>' })
    const error = await caught(api.deleteUser({ user_id: 'me' }, { version: user.version }))
    assert.ok(error instanceof ApiError)
    assert.deepEqual([error.code, error.status, error.retryable], [code, status, code === 'NETWORK'])
  }
})

test('a write names the version that was read last', async () => {
  const { wx, api } = open()
  const { id: order_id, items } = await api.createOrder({ items: [ITEM, ITEM] })
  const { version } = await api.updateOrder({ order_id, remark: '一' }) // of the answer to the POST
  assert.equal(headerOf(wx, 'If-Match'), '"1"')
  await api.updateOrder({ order_id, remark: '二' }) // of the answer to the PUT
  assert.equal(headerOf(wx, 'If-Match'), `"${version}"`)
  const item_id = items[0].id
  await api.updateOrderItem({ order_id, item_id, quantity: 3 }) // an item has the version of its order
  await api.createOrderItem({ order_id, ...ITEM })
  await api.updateOrder({ order_id, remark: '三' })
  await api.deleteOrderItem({ order_id, item_id })
  const order = await api.getOrder({ order_id })
  await api.deleteOrder({ order_id })
  assert.equal(headerOf(wx, 'If-Match'), `"${order.version}"`)
})

test('so it does after a list, a login, and a write about a part', async () => {
  const phone = open()
  const { id: order_id } = await phone.api.createOrder({ items: [ITEM] })
  await phone.api.setProfile({ nickname: '阿上' })
  await phone.api.updateUser({ user_id: 'me', nickname: '阿快' })
  await phone.api.updatePersonalData({ user_id: 'me', email: 'shang@example.com' })
  const other = open({ wx: createWx({ openid: phone.wx.openid }) })
  await other.api.listOrders({ page: 1, page_size: 5 })
  await other.api.updateOrder({ order_id, remark: '一' })
  await other.api.updateUser({ user_id: 'me', nickname: '小上' }) // the login gives the user
  await other.api.listOrderItems({ order_id, page: 1 })
  await other.api.updateOrder({ order_id, status: 'cancelled' })
})

test('a version that is given goes before the one that was read', async () => {
  const { wx, api, ConflictError } = open()
  const { id: order_id, version } = await api.createOrder({ items: [ITEM] })
  const shown = await api.updateOrder({ order_id, remark: '一' })
  for (const call of [
    () => api.updateOrder({ order_id, remark: '二', version }),
    () => api.updateOrder({ order_id, remark: '二' }, { version }),
  ]) {
    assert.ok((await caught(call())) instanceof ConflictError)
  }
  await api.updateOrder({ order_id, remark: '二', version: shown.version })
  assert.equal('version' in JSON.parse(wx.requests[wx.requests.length - 1].data), false)
})

test('a write of what was not read is refused, as nobody knows what it would replace', async () => {
  const { api, wx } = open()
  const { id: order_id } = await api.createOrder({ items: [ITEM] })
  const other = open({ wx: createWx({ openid: wx.openid }) })
  assert.equal((await caught(other.api.updateOrder({ order_id, remark: '一' }))).code, 428)
})

/** A client whose reads answer with a version that is the id, and the versions of all its requests. */
async function readAndWrite() {
  const { wx, api } = open()
  await api.logIn()
  const answers = []
  wx.request = options => {
    const id = Number(options.url.split('/').pop())
    answers.push(options.header['if-match'])
    const data = options.method === 'GET' ? { id, version: id } : {}
    setImmediate(() => {
      options.success({ statusCode: 200, header: {}, data: { code: 200, message: '', data } })
      options.complete()
    })
    return { abort() {} }
  }
  return { api, answers }
}

test('the versions of 500 resources are kept', async () => {
  const { api, answers } = await readAndWrite()
  for (let order_id = 1; order_id <= 501; order_id++) await api.getOrder({ order_id })
  for (const order_id of [1, 2, 501]) await api.updateOrder({ order_id, remark: null })
  assert.deepEqual(answers.slice(-3), [undefined, '"2"', '"501"'])
})

test('of these, the one that was read longest ago goes first', async () => {
  const { api, answers } = await readAndWrite()
  for (let order_id = 1; order_id <= 500; order_id++) await api.getOrder({ order_id })
  for (const order_id of [1, 501]) await api.getOrder({ order_id })
  for (const order_id of [1, 2, 3]) await api.updateOrder({ order_id, remark: null })
  assert.deepEqual(answers.slice(-3), ['"1"', undefined, '"3"'])
})

test('headers that the caller gives are sent, in any case', async () => {
  const { wx, api } = open()
  const post = headers => api.request({ method: 'POST', path: '/api/v1/orders', body: { items: [ITEM] }, headers })
  const order = await post({ 'Idempotency-Key': 'of-the-caller' })
  assert.equal((await post({ 'idempotency-key': 'of-the-caller' })).id, order.id)
  assert.deepEqual(headersOf(wx).filter(([name]) => name === 'idempotency-key'), [['idempotency-key', 'of-the-caller']])
  const path = `/api/v1/orders/${order.id}`
  await api.request({ method: 'PUT', path, body: { remark: '一' } }) // with the version that was read
  for (const name of ['If-Match', 'if-match']) {
    const { code } = await caught(api.request({ method: 'PUT', path, body: { remark: '二' }, headers: { [name]: '"1"' } }))
    assert.equal(code, 412)
  }
  await api.request({ path: '/api/v1/users/me', headers: { 'Accept-Language': 'en', 'X-Own': 'Value', Authorization: '?' } })
  assert.equal(headersOf(wx).filter(([name]) => name === 'authorization').length, 1) // the client's
  assert.deepEqual([headerOf(wx, 'Accept-Language'), headerOf(wx, 'X-Own')], ['en', 'Value'])
})

test('a base URL may end with a slash', async () => {
  const { wx, api } = open({ baseUrl: `${process.env.SERVICE_URL}/` })
  await api.getMe()
  await api.request({ path: 'api/v1/users/me' })
  assert.deepEqual(
    wx.requests.map(({ url }) => url.slice(process.env.SERVICE_URL.length)),
    ['/api/v1/auth/wechat', '/api/v1/users/me', '/api/v1/users/me'],
  )
})

test('a success may have no data', async t => {
  const proxy = await startProxy(t)
  const { api } = open({ baseUrl: proxy.url })
  await api.logIn()
  for (const data of [null, { items: [null] }]) {
    proxy.handle = () => ({ status: 200, headers: {}, body: { code: 200, message: '', data } })
    for (const method of ['GET', 'POST', 'PUT', 'DELETE']) {
      assert.deepEqual(await api.request({ method, path: '/api/v1/things' }), data)
    }
  }
})

test('412 is a ConflictError with what is there now; the next write may name that', async () => {
  const { wx, api } = open()
  const { id: order_id } = await api.createOrder({ items: [ITEM], remark: '零' })
  const other = open({ wx: createWx({ openid: wx.openid }) })
  await other.api.getOrder({ order_id })
  await other.api.updateOrder({ order_id, remark: '别人' })
  const conflict = await caught(api.updateOrder({ order_id, remark: '我' }))
  assert.equal(conflict.constructor.name, 'ConflictError')
  assert.deepEqual([conflict.code, conflict.status, conflict.current.remark], [412, 412, '别人'])
  const saved = await api.updateOrder({ order_id, remark: '我' })
  assert.equal(saved.version, conflict.current.version + 1)
})

test('a ConflictError whose resource cannot be read has no current one', async t => {
  const proxy = await startProxy(t)
  const { api, ConflictError } = open({ baseUrl: proxy.url })
  const { id: order_id } = await api.createOrder({ items: [ITEM] })
  proxy.handle = ({ method }) => answer(method === 'PUT' ? 412 : 404)
  const conflict = await caught(api.updateOrder({ order_id, remark: '我' }))
  assert.ok(conflict instanceof ConflictError)
  assert.equal(conflict.current, null)
})

/** What wx.getUserProfile gives: encrypted with the session_key of the last wx.login. */
const encrypted = openid => simulator('user_data', { openid, data: { openId: openid, nickName: '阿上', avatarUrl: 'https://thirdwx.qlogo.cn/1' } })

test('wx.checkSession is asked where data is encrypted, and nowhere else', async () => {
  const { wx, api } = open()
  await api.logIn()
  await api.setProfile({ nickname: '一' })
  await api.setPhone({ code: (await simulator('phone_codes', { openid: wx.openid, phone: '13812345678' })).code })
  await api.createOrder({ items: [ITEM], remark: '"encryptedData":' })
  assert.equal(wx.checks, 0)
  assert.equal((await api.setProfile(await encrypted(wx.openid))).nickname, '阿上')
  assert.equal(wx.checks, 1)
  assert.equal(wx.logins, 1)
})

test('463 is a StaleDataError, after a silent login; new data is accepted', async () => {
  const { wx, api, StaleDataError } = open()
  await api.logIn()
  const data = await encrypted(wx.openid)
  for (let i = 0; i < 3; i++) await open({ wx: createWx({ openid: wx.openid }) }).api.logIn() // each replaces the session_key
  const stale = await caught(api.setProfile(await encrypted(wx.openid)).then(() => api.setProfile(data)))
  assert.ok(stale instanceof StaleDataError)
  assert.deepEqual([stale.code, stale.status, stale.retryable], [463, 409, false])
  assert.equal(wx.logins, 2)
  assert.equal((await api.setProfile(await encrypted(wx.openid))).nickname, '阿上')
  assert.equal(wx.logins, 2)
})

test('where wx.checkSession fails nothing is sent: a silent login and a StaleDataError', async () => {
  const { wx, api, StaleDataError } = open()
  await api.logIn()
  const data = await encrypted(wx.openid)
  wx.sessionIsValid = false
  const before = wx.requests.length
  const stale = await caught(api.setProfile(data))
  assert.ok(stale instanceof StaleDataError)
  assert.deepEqual([stale.code, stale.message], [463, '数据已过时，请重新获取'])
  assert.equal(wx.logins, 2)
  assert.deepEqual(wx.requests.slice(before).map(request => request.method), ['POST']) // the login's
  wx.sessionIsValid = true
  assert.equal((await api.setProfile(await encrypted(wx.openid))).nickname, '阿上')
})

test('without a network wx.checkSession fails, too: that is OFFLINE, and the session goes on', async () => {
  const { wx, api } = open()
  await api.logIn()
  const data = await encrypted(wx.openid)
  wx.setNetwork('none')
  assert.equal((await caught(api.setProfile(data))).code, 'OFFLINE')
  wx.setNetwork('wifi')
  const { checkSession } = wx
  wx.checkSession = options => (wx.setNetwork('none'), checkSession(options)) // lost meanwhile
  assert.equal((await caught(api.setProfile(data))).code, 'OFFLINE')
  wx.checkSession = checkSession
  wx.setNetwork('wifi')
  assert.equal((await api.setProfile(data)).nickname, '阿上')
  assert.equal(wx.logins, 1)
})

test('a StaleDataError comes also if that login fails', async t => {
  const proxy = await startProxy(t)
  const { wx, api, StaleDataError } = open({ baseUrl: proxy.url })
  await api.logIn()
  proxy.handle = first(1, request => request.method === 'PUT', () => answer(409, {}, 463))
  wx.beforeLogin = async () => {
    throw new Error('system error')
  }
  assert.ok((await caught(api.setPhone({ code: '0123456789' }))) instanceof StaleDataError)
})

test("WeChat's failures are those of the call", async () => {
  const { api } = open({ hurry: 50 })
  await fault('errcode', { errcode: 40226 })
  assert.deepEqual([(await caught(api.getMe())).code], [462])
  await fault('errcode', { errcode: 40013 })
  assert.deepEqual([(await caught(api.getMe())).code], [520])
})
