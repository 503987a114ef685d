/**
 * 取消请求：把它作为 `signal` 传入，离开页面时调用 `abort()`。
 * Cancels calls: pass it as `signal`, and call `abort()` when the page is left.
 */
class Signal {
  constructor() {
    this.aborted = false
    /** @type {(() => void) | null} */
    this.onabort = null
  }

  abort() {
    this.aborted = true
    if (this.onabort) this.onabort()
  }
}

module.exports = { Signal }
