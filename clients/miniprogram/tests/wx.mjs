// A thin `wx`: real HTTP with WeChat's semantics, and what happens to a phone: no network, the background, a new user.
import { readFileSync } from 'node:fs'
import http from 'node:http'

const { SERVICE_URL, SIMULATOR_URL, CONTROL_URL } = process.env
const CONCURRENT = 10 // more requests wait in WeChat's own queue
const BACKGROUND_MS = 100 // WeChat gives requests 5 s after the mini-program went to the background
const SOURCE = readFileSync(new URL('../kuaishang.js', import.meta.url), 'utf8')

const ERRORS = {
  ECONNREFUSED: 'request:fail errcode:-102 cronet_error_code:-102 error_msg:net::ERR_CONNECTION_REFUSED',
  ECONNRESET: 'request:fail errcode:-101 cronet_error_code:-101 error_msg:net::ERR_CONNECTION_RESET',
  OFFLINE: 'request:fail errcode:-106 cronet_error_code:-106 error_msg:net::ERR_INTERNET_DISCONNECTED',
}

/**
 * A phone with the mini-program open.
 *
 * @param {string} openid who uses it; a new user by default
 */
export function createWx({ openid = `o-${Math.random().toString(36).slice(2)}`, storage = new Map() } = {}) {
  const listeners = { show: [], hide: [], network: [] }
  const running = new Set()
  const queue = []
  let networkType = 'wifi'
  let isHidden = false

  const wx = {
    openid,
    storage,
    logins: 0,
    checks: 0, // of the session
    aborts: 0,
    most: 0, // requests at once
    requests: [], // as the mini-program made them
    sessionIsValid: true,
    asked: false, // for the network

    /** What happens to a request instead of an answer, or null; may return a promise. */
    fault: () => null,
    /** What wx.login waits for; if it throws, the login fails with that errMsg. */
    beforeLogin: async () => {},
    /** The code that wx.login gives. */
    makeCode: async () => (await simulator('codes', { openid })).code,

    request(options) {
      const task = { over: false, abort: () => finish(task, 'fail', { errMsg: 'request:fail abort' }) && wx.aborts++ }
      task.options = options
      wx.requests.push({ ...options, inBackground: isHidden })
      queue.push(task)
      setImmediate(startNext)
      return { abort: task.abort }
    },

    login({ success, fail = () => {}, complete = () => {} }) {
      wx.logins++
      const done = (callback, result) => (callback(result), complete(result))
      wx.beforeLogin()
        .then(wx.makeCode)
        .then(code => done(success, { code, errMsg: 'login:ok' }))
        .catch(error => done(fail, { errMsg: `login:fail ${error.message}` }))
    },
    checkSession({ success = () => {}, fail = () => {}, complete = () => {} }) {
      wx.checks++
      const isValid = wx.sessionIsValid && networkType !== 'none'
      const result = { errMsg: isValid ? 'checkSession:ok' : 'checkSession:fail session time out' }
      setImmediate(() => ((isValid ? success : fail)(result), complete(result)))
    },

    getStorageSync: key => storage.get(key) ?? '',
    setStorageSync: (key, value) => void storage.set(key, value),
    removeStorageSync: key => void storage.delete(key),

    getNetworkType({ success, complete = () => {} }) {
      const result = { networkType, errMsg: 'getNetworkType:ok' }
      setImmediate(() => (success(result), complete(result), (wx.asked = true)))
    },
    onNetworkStatusChange: listener => void listeners.network.push(listener),
    onAppShow: listener => void listeners.show.push(listener),
    onAppHide: listener => void listeners.hide.push(listener),

    /** The network comes, or goes with all that is on its way. Without `tells` nobody is told. */
    setNetwork(type, { tells = true } = {}) {
      networkType = type
      if (type === 'none') for (const task of running) finish(task, 'fail', { errMsg: ERRORS.OFFLINE })
      if (tells) listeners.network.forEach(listener => listener({ isConnected: type !== 'none', networkType: type }))
    },
    /** The user leaves the mini-program; soon after WeChat interrupts its requests. */
    hide() {
      isHidden = true
      listeners.hide.forEach(listener => listener({}))
      setTimeout(() => {
        if (isHidden) for (const task of running) finish(task, 'fail', { errMsg: 'request:fail interrupted' })
      }, BACKGROUND_MS)
    },
    show() {
      isHidden = false
      listeners.show.forEach(listener => listener({ scene: 1001, path: 'pages/index/index', query: {} }))
    },
  }

  function startNext() {
    while (queue.length && running.size < CONCURRENT) start(queue.shift())
  }

  async function start(task) {
    if (task.over) return
    running.add(task)
    wx.most = Math.max(wx.most, running.size)
    if (isHidden) return setTimeout(() => finish(task, 'fail', { errMsg: 'request:fail interrupted' }), BACKGROUND_MS)
    if (networkType === 'none') return finish(task, 'fail', { errMsg: ERRORS.OFFLINE })
    const { timeout = 60_000 } = task.options
    task.timer = setTimeout(() => finish(task, 'fail', { errMsg: 'request:fail timeout' }), timeout)
    const fault = await wx.fault(task.options)
    if (fault === 'hangs' || task.over) return
    if (fault) return finish(task, 'fail', { errMsg: fault })
    send(task)
  }

  function send(task) {
    const { url, data, header = {}, method = 'GET' } = task.options
    const body = data === undefined ? undefined : typeof data === 'string' ? data : JSON.stringify(data)
    const headers = { 'content-type': 'application/json', ...header }
    if (body !== undefined) headers['content-length'] = Buffer.byteLength(body)
    task.request = http.request(url, { method, headers, agent: false }, response => {
      const parts = []
      response.on('data', part => parts.push(part))
      response.on('error', error => finish(task, 'fail', { errMsg: ERRORS[error.code] || `request:fail ${error.message}` }))
      response.on('end', () => {
        const text = Buffer.concat(parts).toString()
        let content = text
        try {
          content = JSON.parse(text)
        } catch {} // WeChat gives the text
        const names = {}
        for (let i = 0; i < response.rawHeaders.length; i += 2) names[response.rawHeaders[i]] = response.rawHeaders[i + 1]
        finish(task, 'success', { data: content, statusCode: response.statusCode, header: names, errMsg: 'request:ok' })
      })
    })
    task.request.on('error', error => finish(task, 'fail', { errMsg: ERRORS[error.code] || `request:fail ${error.message}` }))
    task.request.end(body)
  }

  function finish(task, callback, result) {
    if (task.over) return false
    task.over = true
    clearTimeout(task.timer)
    running.delete(task)
    task.request?.destroy()
    task.options[callback]?.(result)
    task.options.complete?.(result)
    startNext()
    return true
  }

  return wx
}

/**
 * The client on such a phone, as `require('./kuaishang')` gives it, with an api of it.
 *
 * @param {number} hurry by how much its waits are shortened, though not its deadlines
 * @param {{ now: number }} clock the milliseconds that its clock is ahead
 */
export function open({ wx = createWx(), baseUrl = SERVICE_URL, hurry = 1, clock = { ahead: 0 }, ...options } = {}) {
  const waits = []
  const hurried = (callback, ms, ...rest) => {
    waits.push(ms)
    return setTimeout(callback, ms / hurry, ...rest)
  }
  const date = { now: () => Date.now() + clock.ahead }
  const module = { exports: {} }
  new Function('wx', 'module', 'setTimeout', 'Date', SOURCE)(wx, module, hurried, date)
  return { wx, waits, clock, ...module.exports, api: module.exports.createClient({ baseUrl, ...options }) }
}

async function json(url, method, body) {
  const response = await fetch(url, {
    method,
    body: body && JSON.stringify(body),
    headers: { 'content-type': 'application/json' },
  })
  if (!response.ok) throw new Error(`${method} ${url}: ${response.status} ${await response.text()}`)
  return response.json()
}

/** Control the WeChat simulator. */
export const simulator = (control, body = {}) => json(`${SIMULATOR_URL}/simulator/${control}`, 'POST', body)
/** Let the simulator's next calls of a path fail. */
export const fault = (kind, details = {}) => simulator('faults', { path: '/sns/jscode2session', kind, ...details })
/** Use up a code, as if it had been exchanged before. */
export async function burn(code) {
  const { WECHAT_APP_ID: appid, WECHAT_APP_SECRET: secret } = process.env
  const query = new URLSearchParams({ appid, secret, js_code: code, grant_type: 'authorization_code' })
  await json(`${SIMULATOR_URL}/sns/jscode2session?${query}`, 'GET')
}
/** How often login codes were exchanged. */
export async function exchanges() {
  const { calls } = await json(`${SIMULATOR_URL}/simulator/calls`, 'GET')
  return calls.filter(call => call.path === '/sns/jscode2session').length
}
/** Stop or start the service. */
export const control = action => json(`${CONTROL_URL}/${action}`, 'POST')

/** The token of a session that has ended. */
export async function expiredToken(openid) {
  const { code } = await simulator('codes', { openid })
  const { data } = await json(`${SERVICE_URL}/api/v1/auth/wechat`, 'POST', { code })
  const headers = { authorization: `Bearer ${data.token}` }
  await fetch(`${SERVICE_URL}/api/v1/auth/session`, { method: 'DELETE', headers })
  return data.token
}

/**
 * A proxy in front of the service that answers as `handle` says.
 *
 * `handle(request, forward)` may return nothing, which forwards the request, an answer `{ status, headers, body }`,
 * `'reset'`, which ends the connection, or `'lose'`, which does so once the service has answered.
 */
export async function startProxy(t) {
  const proxy = { handle: async () => {}, requests: [] }
  const forward = (request, body) =>
    new Promise((resolve, reject) => {
      const { method, url, headers } = request
      const onward = http.request(SERVICE_URL + url, { method, headers, agent: false }, response => {
        const parts = []
        response.on('data', part => parts.push(part))
        response.on('end', () => {
          resolve({ status: response.statusCode, headers: response.rawHeaders, body: Buffer.concat(parts) })
        })
        response.on('error', reject)
      })
      onward.on('error', reject)
      onward.end(body)
    })
  const server = http.createServer(async (request, response) => {
    const parts = []
    for await (const part of request) parts.push(part)
    const body = Buffer.concat(parts)
    proxy.requests.push({ method: request.method, url: request.url, headers: request.headers, body: body.toString() })
    try {
      const wanted = await proxy.handle(request)
      if (wanted === 'reset') return request.socket.destroy()
      const answer = typeof wanted === 'object' ? wanted : await forward(request, body)
      if (wanted === 'lose') return request.socket.destroy()
      const content = typeof answer.body === 'object' && !Buffer.isBuffer(answer.body) ? JSON.stringify(answer.body) : answer.body
      response.writeHead(answer.status, answer.headers || { 'Content-Type': 'application/json' })
      response.end(content)
    } catch {
      request.socket.destroy()
    }
  })
  await new Promise(resolve => server.listen(0, '127.0.0.1', resolve))
  t.after(() => {
    server.closeAllConnections()
    server.close()
  })
  proxy.url = `http://127.0.0.1:${server.address().port}`
  return proxy
}

/** An answer in the envelope, as the service gives it. */
export const answer = (status, headers = {}, code = status) => ({
  status,
  headers: { 'Content-Type': 'application/json', 'X-Trace-Id': 'f'.repeat(32), ...headers },
  body: { code, message: `code ${code}`, data: null },
})

/** Call `handle` for the first requests that `matches` selects. */
export function first(count, matches, handle) {
  let left = count
  return request => (left > 0 && matches(request) ? (left--, handle(request)) : undefined)
}

/** Wait until a condition holds. */
export async function until(condition, seconds = 30) {
  const end = Date.now() + seconds * 1000
  while (!(await condition())) {
    if (Date.now() > end) throw new Error(`not within ${seconds} s: ${condition}`)
    await new Promise(resolve => setTimeout(resolve, 5))
  }
}

export const ITEM = { sku: 'tea', name: '龙井', quantity: 2, unit_price: 1200 }
