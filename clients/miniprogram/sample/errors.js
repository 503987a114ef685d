const { ApiError } = require('./kuaishang')

const BUSY = '服务繁忙，请稍后再试'
/** @type {Record<string | number, string>} */
const TEXTS = {
  400: '请检查填写的内容',
  401: '登录已失效，请重试',
  404: '内容不存在，可能已被删除',
  412: '内容已在别处被修改',
  429: '操作太频繁，请稍后再试',
  460: '操作已过期，请重新点一次',
  461: '操作已过期，请重新点一次',
  503: BUSY,
  504: BUSY,
}

/**
 * 一次失败在页面上怎么说。What a page shows of a failure.
 *
 * @param {any} error 捕获到的错误
 * @returns {{ text: string, canRetry: boolean } | null} 取消的调用不显示，为 null
 */
function describe(error) {
  if (!(error instanceof ApiError)) return { text: error.message, canRetry: false }
  if (error.code === 'ABORTED') return null
  const isOurs = error.status >= 500 && !error.retryable
  const text = isOurs ? `服务出错了，反馈时请附上编号 ${error.traceId}` : TEXTS[error.code] || error.message
  return { text, canRetry: error.retryable || error.code === 401 }
}

module.exports = { describe }
