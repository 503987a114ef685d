// 快上小程序客户端，用法见 README.md。
// Base library 2.23.4 or later.

const resource = (name, one, all = one.replace(/\/[^/]+$/, '')) => `
list${name}s GET ${all}
create${name} POST ${all}
get${name} GET ${one}
update${name} PUT ${one}
delete${name} DELETE ${one}`

// Of openapi.json. POST takes an Idempotency-Key, PUT and DELETE an If-Match; not with a minus.
const OPERATIONS = `
getMe GET /users/me
getWechatSession GET /auth/wechat
logOut DELETE- /auth/session
logOutEverywhere DELETE- /auth/sessions
searchUsers POST- /users/search
setPhone PUT- /users/me/phone
setProfile PUT- /users/me/profile
exportPersonalData GET /users/me/export
getPersonalData GET /users/{user_id}/personal-data
updatePersonalData PUT /users/{user_id}/personal-data
getFullPersonalData GET /users/{user_id}/personal-data/full
${resource('User', '/users/{user_id}')}
${resource('Order', '/orders/{order_id}')}
${resource('OrderItem', '/orders/{order_id}/items/{item_id}')}`

const SLOTS = 8 // requests at once, of the 10 that WeChat allows with uploads
const RESERVED = 2 // of these, for logins and priority
const TRIES = 5
const MESSAGES = {
	ABORTED: '已取消',
	LOGIN_LIMIT: '登录过于频繁',
	NETWORK: '网络异常',
	OFFLINE: '没有网络',
	TIMEOUT: '请求超时',
	463: '数据已过时，请重新获取',
}

// `code` is the service's, or one of MESSAGES. `retryable`: the same may succeed later.
class ApiError extends Error {
	constructor(/** @type {any} */ { code, message, status = 0, traceId = '', data = null }) {
		super(message || MESSAGES[code] || `HTTP ${status}`)
		const retryable = [429, 503, 504, 'LOGIN_LIMIT', 'NETWORK', 'OFFLINE', 'TIMEOUT'].includes(code)
		Object.assign(this, { code, status, traceId, data, retryable })
	}
}
class StaleDataError extends ApiError {} // get the data from WeChat again, then send it
class ConflictError extends ApiError {} // `current`: as it is now

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
const ask = (name) => new Promise((resolve) => wx[name]({ success: resolve, fail: resolve }))
// The user, order… that a path is about: its parts share its version.
const keyOf = (path) => (/^\/api\/v1\/[^/]+\/[^/?]+/.exec(path) || [])[0]

const query = (args) =>
	Object.entries(args)
		.filter(([, value]) => value != null)
		.map(([name, value], i) => `${i ? '&' : '?'}${name}=${encodeURIComponent(value)}`)
		.join('')

function perMinute(count) {
	let times = []
	return () => {
		times = times.filter((time) => Date.now() - time < 60000)
		return times.length < count && times.push(Date.now())
	}
}

function read({ statusCode: status, data, header }) {
	const named = (name) => header[Object.keys(header).find((key) => key.toLowerCase() === name) || '']
	const envelope = data && data.code ? data : { code: /^4/.test(status) ? status : 'NETWORK' } // of a proxy
	return { status, traceId: named('x-trace-id'), retryAfter: named('retry-after'), ...envelope }
}

function createClient({ baseUrl, timeout = 30000, storageKey = 'kuaishang' }) {
	const mayLogIn = perMinute(3)
	const mayRetry = perMinute(40)
	const versions = new Map()
	const urgent = []
	const usual = []
	let running = 0
	let token = stored('get')
	let generation = 0 // of the token: a late 401 of an earlier one says nothing about it
	let login = null
	let online = true
	let hiddenAt = 0
	let hiddenFor = 0

	function stored(verb, value) {
		try {
			return wx[`${verb}StorageSync`](storageKey, value)
		} catch (error) {
			return ''
		}
	}

	const clock = () => (hiddenAt || Date.now()) - hiddenFor // in ms; no deadline passes in the background
	const checkNetwork = async () => {
		online = (await ask('getNetworkType')).networkType !== 'none'
	}
	checkNetwork()
	wx.onNetworkStatusChange((status) => (online = status.isConnected))
	wx.onAppHide(() => (hiddenAt = Date.now()))
	wx.onAppShow(() => {
		hiddenFor += hiddenAt && Date.now() - hiddenAt
		hiddenAt = 0
		checkNetwork()
	})

	const next = () => {
		const go = (running < SLOTS && urgent.shift()) || (running < SLOTS - RESERVED && usual.shift())
		if (!go) return
		running++
		go()
	}
	const slot = (queue) =>
		new Promise((go) => {
			queue.push(go)
			next()
		})
	const release = () => {
		running--
		next()
	}

	const run = (work, /** @type {any} */ { timeout: limit = timeout, signal } = {}) =>
		new Promise((resolve, reject) => {
			const call = { deadline: clock() + limit }
			const on = signal || {}
			const { onabort } = on
			const end = (settle) => (outcome) => {
				call.over = true
				clearTimeout(call.timer)
				if (on.removeEventListener) on.removeEventListener('abort', cancel)
				if (on.onabort === hook) on.onabort = onabort
				settle(outcome)
			}
			const stop = (code) => {
				if (call.over) return
				end(reject)(new ApiError({ code }))
				if (call.abort) call.abort()
			}
			const cancel = () => stop('ABORTED')
			const hook = () => [onabort && onabort(), cancel()]
			const watch = async () => {
				while (hiddenAt) await sleep(100)
				if (clock() < call.deadline) call.timer = setTimeout(watch, call.deadline - clock())
				else stop(online ? 'TIMEOUT' : 'OFFLINE')
			}
			watch()
			if (on.aborted) cancel()
			else if (on.addEventListener) on.addEventListener('abort', cancel)
			else on.onabort = hook
			work(call).then(end(resolve), end(reject))
		})

	function logIn() {
		const done = () => (login = null)
		if (!login) (login = run(exchangeCode)).then(done, done)
		return login
	}

	async function exchangeCode(call, isLast) {
		if (!mayLogIn()) throw new ApiError({ code: 'LOGIN_LIMIT' })
		const { code, errMsg } = await ask('login')
		if (!code) throw new ApiError({ code: 'NETWORK', data: { errMsg } })
		const op = { method: 'POST', path: '/api/v1/auth/wechat', body: JSON.stringify({ code }), isLogin: true }
		try {
			const data = await perform(call, op)
			token = data.token
			generation++
			stored('set', token)
			remember('/api/v1/users/me', data.user)
			return data.user
		} catch (error) {
			if (isLast || ![460, 461].includes(error.code)) throw error
			return exchangeCode(call, true)
		}
	}

	async function perform(call, op) {
		const isSafe = /GET|POST/.test(op.method) // a POST by its key
		for (let tries = 1; ; tries++) {
			op.generation = generation
			const isStale = /"encryptedData":/.test(op.body) && !/ok$/.test((await ask('checkSession')).errMsg) && online
			const answer = isStale ? { code: 463 } : await attempt(call, op, isSafe && tries < TRIES)
			const { code, data } = answer
			if (code === 200) {
				remember(op.path, data, op.method === 'POST')
				if (op.path.includes('/auth/session')) token = stored('remove')
				return data
			}
			if ((code === 401 || code === 463) && op.generation === generation) token = ''
			if (code === 401 && !op.isRenewed) {
				op.isRenewed = true
				continue
			}
			const error = new ({ 412: ConflictError, 463: StaleDataError }[code] || ApiError)(answer)
			if (code === 463 && !token) await logIn().catch(() => {})
			if (code === 412) error.current = await perform(call, { method: 'GET', path: op.path }).catch(() => null)
			let wait = (Number(answer.retryAfter) || 0) * 1000 + 250 * 2 ** tries * (1 + Math.random())
			if (hiddenAt || !online) wait = 0 // attempt() waits
			const isLate = tries === TRIES || clock() + wait > call.deadline
			if (call.over || !isSafe || !error.retryable || isLate || !mayRetry()) throw error
			await sleep(wait)
		}
	}

	async function attempt(call, op, mayRepeat) {
		if (!online) await checkNetwork()
		if (!online && !call.abort) throw new ApiError({ code: 'OFFLINE' })
		for (;;) {
			while (!call.over && (hiddenAt || !online)) await sleep(100)
			if (!call.over && !token && !op.isLogin) await logIn()
			await slot(op.isLogin || op.priority ? urgent : usual)
			if (!call.over && !hiddenAt && online && (token || op.isLogin)) break
			release()
			if (call.over) throw call
		}
		op.generation = generation
		const left = call.deadline - clock()
		return new Promise((resolve) => {
			const task = wx.request({
				url: baseUrl.replace(/\/?$/, '/') + op.path.replace(/^\//, ''), // on no other host
				method: op.method,
				data: op.body,
				header: { ...op.headers, ...(!op.isLogin && { authorization: `Bearer ${token}` }) },
				timeout: Math.ceil(mayRepeat && left > 4000 ? left / 2 : left), // so that a retry has time
				success: (answer) => resolve(read(answer)),
				fail: (data) => resolve({ code: /time.?.?out/i.test(data.errMsg) ? 'TIMEOUT' : 'NETWORK', data }),
				complete: release,
			})
			call.abort = () => task.abort()
		})
	}

	function remember(path, data, isPart) {
		const { id, version, items } = data || {}
		if (isPart) path = `${path.split('?')[0]}/${id}`
		const key = keyOf(path)
		if (version && key) {
			versions.delete(key)
			versions.set(key, version)
		}
		if (versions.size > 500) versions.delete(versions.keys().next().value)
		for (const item of Array.from(items || [])) remember(path, item, true)
	}

	async function request(options) {
		const { method = 'GET', path, body, version = versions.get(keyOf(path)) } = options
		const headers = {}
		const key = options.idempotencyKey || [Date.now(), Math.random(), Math.random()].join('-')
		if (method === 'POST') headers['idempotency-key'] = key
		if (version && /^(PUT|DELETE)$/.test(method)) headers['if-match'] = `"${version}"`
		for (const name in options.headers) headers[name.toLowerCase()] = options.headers[name]
		const op = { ...options, method: method.replace('-', ''), headers, body: JSON.stringify(body) }
		return run((call) => perform(call, op), options)
	}

	const api = { request, logIn: () => (token ? api.getMe() : logIn()) }
	for (const line of OPERATIONS.match(/.+/g) || []) {
		const [id, method, template] = line.split(' ')
		api[id] = (/** @type {any} */ { version, ...rest } = {}, options) => {
			const path = `/api/v1${template}`.replace(/{(\w+)}/g, (_, name) => {
				const value = rest[name]
				delete rest[name]
				return encodeURIComponent(value)
			})
			const sent = /^P/.test(method) ? { path, body: rest } : { path: path + query(rest) }
			return request({ method, version, ...sent, ...options })
		}
	}
	return api
}

module.exports = { createClient, ApiError, StaleDataError, ConflictError }
