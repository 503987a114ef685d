/**
 * The pages of the sample against the running service and WeChat simulator, whose addresses are SERVICE_URL and SIMULATOR_URL.
 * tests/clients/test_sample.py starts them.
 */
'use strict'

const assert = require('node:assert/strict')
const { readFileSync } = require('node:fs')
const path = require('node:path')
const { after, before, beforeEach, test } = require('node:test')
const { Page, SAMPLE, settle } = require('./pages')

const { SERVICE_URL, SIMULATOR_URL } = process.env
const sample = (name) => require(path.join(SAMPLE, name))
const PAGES = sample('app.json').pages.map((page) => page.split('/').pop())

let api
let proxy // between the sample and the service
let closeProxy
let first // of proxy.handle
let simulator
let visited // where the pages went

/** The requests to the service, each as `GET /api/v1/…`. */
const requests = () => proxy.requests.map(({ method, url }) => `${method} ${url}`)

before(async () => {
  const helpers = await import('./wx.mjs')
  first = helpers.first
  simulator = helpers.simulator
  proxy = await helpers.startProxy({ after: (close) => (closeProxy = close) })
  globalThis.wx = Object.assign(helpers.createWx(), {
    login: ({ fail }) => fail({ errMsg: 'login:fail no account' }), // so the simulator must stand in
    navigateTo: ({ url }) => visited.push(url),
    redirectTo: ({ url }) => visited.push(url),
    stopPullDownRefresh: () => visited.push('stopPullDownRefresh'),
  })
  const config = { baseUrl: proxy.url, simulator: { url: SIMULATOR_URL, openid: wx.openid } }
  Object.assign(sample('config.js'), config)
  sample('app.js')
  api = sample('api.js')
})

after(() => closeProxy())

beforeEach(() => {
  proxy.requests = []
  proxy.handle = async () => {}
  visited = []
})

const open = (name, query) => new Page(name).open(query)
const order = (remark) =>
  api.createOrder({ items: [{ sku: 'CUP-01', name: '白瓷杯', quantity: 2, unit_price: 3900 }], remark })
const phoneCode = async () => (await simulator('phone_codes', { openid: wx.openid, phone: '13812345678' })).code

test('the page of the profile logs in by itself and shows the user', async () => {
  const page = await open('profile')
  assert.deepEqual(requests(), ['POST /api/v1/auth/wechat', 'GET /api/v1/users/me'])
  assert.equal(page.text('phone'), '未绑定手机号')
  assert.equal(page.text('error'), null)
})

test('the nickname control saves the nickname', async () => {
  const page = await open('profile')
  const control = page.component.querySelector('.nickname')
  assert.equal(control.toJSON().tagName, 'wx-input')
  await page.act('#profile-form', 'submit', { value: { nickname: ' 阿上 ' } })
  assert.equal(page.text('notice'), '昵称已保存')
  assert.equal((await api.getMe()).nickname, '阿上')
  await page.act('#profile-form', 'submit', { value: { nickname: ' ' } })
  assert.equal(page.text('notice'), '请先填写昵称')
  assert.equal((await api.getMe()).nickname, '阿上')
})

test('an avatar needs an upload of your own, and its URL is saved', async () => {
  const file = 'wxfile://tmp_1.jpg'
  let page = await open('profile')
  await page.act('avatar-button', 'chooseavatar', { avatarUrl: file })
  assert.match(page.text('error-text'), /尚未配置图片上传/)
  assert.equal((await api.getMe()).avatar_url, null)

  const upload = sample('upload.js')
  const { uploadAvatar } = upload
  upload.uploadAvatar = async (chosen) => `https://pictures.example.com/${chosen.split('/').pop()}`
  page = await open('profile')
  await page.act('avatar-button', 'chooseavatar', { avatarUrl: file })
  upload.uploadAvatar = uploadAvatar
  assert.equal(page.text('notice'), '头像已保存')
  assert.equal((await api.getMe()).avatar_url, 'https://pictures.example.com/tmp_1.jpg')
})

test('the phone button stores the number, which is shown masked', async () => {
  const page = await open('profile')
  const code = await phoneCode()
  await page.act('get-phone', 'getphonenumber', { code, errMsg: 'getPhoneNumber:ok' })
  assert.equal(page.text('notice'), '手机号已绑定')
  assert.equal(page.text('phone'), '138****5678')
  await page.act('get-phone', 'getphonenumber', { errMsg: 'getPhoneNumber:fail user deny' })
  assert.equal(page.text('notice'), '未授权手机号')
  await page.act('get-phone', 'getphonenumber', { code: 'no-code-of-wechat' })
  assert.equal(page.text('error-text'), '操作已过期，请重新点一次')
})

test('after logging out, the button logs in again', async () => {
  const page = await open('profile')
  await page.act('log-out')
  assert.equal(page.text('phone'), null)
  await page.act('log-in')
  assert.equal(page.text('phone'), '138****5678')
})

test('an order is made, and one whose answer is lost is not made twice', async () => {
  const page = await open('new-order')
  await page.act('submit')
  assert.deepEqual(requests(), [])
  await page.act('plus')
  await page.act('plus', 'tap', {}, 1)
  await page.act('plus', 'tap', {}, 1)
  await page.act('less', 'tap', {}, 1)
  await page.act('remark', 'input', { value: '易碎' })
  assert.equal(page.text('submit'), '提交订单 ¥167.00')
  proxy.handle = first(1, ({ method }) => method === 'POST', () => 'lose')
  await page.act('submit')
  assert.equal(requests().filter((one) => one === 'POST /api/v1/orders').length, 2)
  const { items } = await api.listOrders({ page_size: 2 })
  assert.deepEqual(visited, [`/pages/order/order?id=${items[0].id}`])
  assert.equal(items.length, 1)
  assert.deepEqual([items[0].total, items[0].remark], [16700, '易碎'])
  const { items: parts } = await api.getOrder({ order_id: items[0].id })
  assert.deepEqual(
    parts.map((part) => [part.sku, part.quantity]),
    [
      ['TEA-250', 1],
      ['CUP-01', 1],
    ],
  )
})

test('a person who taps again after a failure orders once', async () => {
  const count = async () => (await api.listOrders({ page_size: 100 })).items.length
  const before = await count()
  const page = await open('new-order')
  await page.act('plus')
  proxy.handle = first(99, ({ method }) => method === 'POST', () => 'lose')
  const { createOrder } = api
  api.createOrder = (args, options) => createOrder(args, { ...options, timeout: 2000 }) // gives up soon
  await page.act('submit')
  api.createOrder = createOrder
  proxy.handle = async () => {}
  assert.match(page.text('error-text'), /网络异常|请求超时/)
  assert.equal(await count(), before + 1)
  await page.act('retry')
  assert.equal(await count(), before + 1)
  assert.equal(visited.length, 1)
  await page.act('plus')
  await page.act('submit')
  assert.equal(await count(), before + 2) // what was changed is another order
})

test('the list loads more, says where it ends, and goes on after a failure', async () => {
  for (let left = 43 - (await api.listOrders({ page_size: 100 })).items.length; left; left--) await order()
  const page = await open('orders')
  assert.equal(page.texts('order').length, 20)
  await page.call('onReachBottom')
  assert.equal(page.texts('order').length, 40)
  const { listOrders } = api
  api.listOrders = (args, options) => listOrders(args, { ...options, timeout: 1 })
  await page.act('more')
  api.listOrders = listOrders
  assert.match(page.text('error-text'), /请求超时/)
  assert.equal(page.text('more'), null)
  assert.equal(page.texts('order').length, 40)
  await page.act('retry')
  assert.equal(page.text('error'), null)
  assert.equal(page.texts('order').length, 43)
  assert.equal(page.text('end'), '没有更多了')
  assert.equal(new Set(page.component.data.orders.map((one) => one.id)).size, 43)
  await page.call('onReachBottom')
  assert.equal(page.texts('order').length, 43)
  await page.call('onPullDownRefresh')
  assert.equal(page.texts('order').length, 20)
  await page.act('order', 'tap', {}, 1)
  await page.act('create')
  const { id } = page.component.data.orders[1]
  assert.deepEqual(visited, ['stopPullDownRefresh', `/pages/order/order?id=${id}`, '/pages/new-order/new-order'])
})

test('after a failed refresh, retrying refreshes', async () => {
  const page = await open('orders')
  await page.act('more')
  assert.equal(page.texts('order').length, 40)
  const { id } = await order('刚下的')
  const { listOrders } = api
  api.listOrders = (args, options) => listOrders(args, { ...options, timeout: 1 })
  await page.call('onPullDownRefresh')
  api.listOrders = listOrders
  assert.match(page.text('error-text'), /请求超时/)
  await page.act('retry')
  assert.deepEqual([page.text('error'), page.texts('order').length], [null, 20])
  assert.equal(page.component.data.orders[0].id, id)
})

test('a page that is left aborts its request and shows nothing', async () => {
  const page = new Page('orders')
  const { aborts } = wx
  const arrived = new Promise((resolve) => {
    proxy.handle = () => resolve() ?? new Promise(() => {}) // never answers
  })
  page.component.instance.onShow()
  await arrived
  await page.close()
  assert.deepEqual(requests(), ['GET /api/v1/orders?page_size=20'])
  assert.equal(wx.aborts - aborts, 1)
  assert.deepEqual([page.component.data.error, page.component.data.orders], [null, []])
})

test('an order that somebody else changed is shown as it is now, and can be saved again', async () => {
  const { id } = await order('原来的')
  const page = await open('order', { id: String(id) })
  assert.deepEqual([page.text('status'), page.text('total')], ['待付款', '¥78.00'])
  const other = sample('kuaishang.js').createClient({ baseUrl: SERVICE_URL, storageKey: 'other' })
  await other.getOrder({ order_id: id })
  await other.updateOrder({ order_id: id, remark: '别人的' })
  await page.act('remark', 'input', { value: '我的' })
  await page.act('save')
  assert.match(page.text('conflict'), /现在的备注是“别人的”/)
  assert.equal(page.component.data.remark, '我的')
  assert.equal((await other.getOrder({ order_id: id })).remark, '别人的')
  await page.act('save')
  assert.equal(page.text('conflict'), null)
  assert.equal((await other.getOrder({ order_id: id })).remark, '我的')
  await page.act('cancel')
  assert.deepEqual([page.text('status'), page.text('cancel')], ['已取消', null])
})

test('failures are shown in words', async () => {
  const missing = await open('order', { id: '999999999' })
  assert.equal(missing.text('error'), '内容不存在，可能已被删除')
  assert.equal(missing.text('retry'), null)
  const { describe } = sample('errors.js')
  const { ApiError } = sample('kuaishang.js')
  const say = (code, status, traceId) => describe(new ApiError({ code, status, traceId, message: '来自服务' }))
  assert.equal(say('ABORTED', 0), null)
  assert.deepEqual(say(403, 403), { text: '来自服务', canRetry: false })
  assert.deepEqual(say(503, 503), { text: '服务繁忙，请稍后再试', canRetry: true })
  assert.deepEqual(say(500, 500, 'ab12'), { text: '服务出错了，反馈时请附上编号 ab12', canRetry: false })
  assert.deepEqual(describe(new Error('不是接口的错误')), { text: '不是接口的错误', canRetry: false })
})

test('the controls are those of WeChat for what only WeChat can ask', () => {
  const markup = readFileSync(path.join(SAMPLE, 'pages/profile/profile.wxml'), 'utf8')
  assert.match(markup, /<input [^>]*type="nickname" name="nickname"/)
  assert.match(markup, /<button [^>]*open-type="chooseAvatar"[^>]* bindchooseavatar="chooseAvatar"/)
  assert.match(markup, /<button [^>]*open-type="getPhoneNumber"[^>]* bindgetphonenumber="setPhone"/)
})

for (const name of PAGES) {
  test(`each handler in ${name}.wxml is a method of the page`, () => {
    const markup = ['templates/error.wxml', `pages/${name}/${name}.wxml`].map((file) =>
      readFileSync(path.join(SAMPLE, file), 'utf8'),
    )
    const handlers = [...markup.join('').matchAll(/\bbind:?\w+="(\w+)"/g)].map(([, handler]) => handler)
    assert.ok(handlers.length > 1)
    const { instance } = new Page(name).component
    assert.deepEqual(handlers.filter((handler) => typeof instance[handler] !== 'function'), [])
  })
}
