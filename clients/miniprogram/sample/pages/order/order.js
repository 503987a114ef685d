const api = require('../../api')
const { describe } = require('../../errors')
const { ConflictError } = require('../../kuaishang')
const { summary, yuan } = require('../../orders')
const { Signal } = require('../../signal')

/** @param {import('../../kuaishang').Order} order */
const show = (order) => ({
  ...summary(order),
  items: order.items.map((item) => ({ ...item, yuan: yuan(item.subtotal) })),
})

Page({
  data: {
    /** @type {ReturnType<typeof show> | null} */
    order: null,
    remark: '',
    conflict: false,
    busy: false,
    /** @type {ReturnType<typeof describe>} */
    error: null,
  },
  id: 0,
  /** @type {Signal | null} */
  signal: null,

  /** @param {Record<string, string | undefined>} query */
  onLoad(query) {
    this.id = Number(query.id)
    return this.load()
  },

  onUnload() {
    if (this.signal) this.signal.abort()
  },

  load() {
    const signal = (this.signal = new Signal())
    return this.attempt(() => api.getOrder({ order_id: this.id }, { signal }))
  },

  retry() {
    return this.load()
  },

  /** @param {WechatMiniprogram.Input} event */
  write(event) {
    this.setData({ remark: event.detail.value })
  },

  // 客户端自动带上读到的版本：此后别处若改过，服务端以 412 拒绝，不会悄悄覆盖。
  save() {
    return this.attempt(() => api.updateOrder({ order_id: this.id, remark: this.data.remark || null }))
  },

  cancel() {
    return this.attempt(() => api.updateOrder({ order_id: this.id, status: 'cancelled' }))
  },

  /** @param {() => Promise<import('../../kuaishang').Order>} call 返回最新的订单 */
  async attempt(call) {
    this.setData({ busy: true, conflict: false, error: null })
    try {
      const order = await call()
      this.setData({ order: show(order), remark: order.remark || '' })
    } catch (error) {
      if (error instanceof ConflictError && error.current) {
        // 显示现在的内容，保留用户写的备注，由用户决定是否再保存。
        this.setData({ order: show(/** @type {import('../../kuaishang').Order} */ (error.current)), conflict: true })
      } else {
        this.setData({ error: describe(error) })
      }
    }
    this.setData({ busy: false })
  },
})
