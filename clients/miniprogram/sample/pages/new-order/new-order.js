const api = require('../../api')
const { describe } = require('../../errors')
const { yuan } = require('../../orders')

// 示例商品；价格单位为分。
const GOODS = [
  { sku: 'TEA-250', name: '龙井 250g', unit_price: 12800 },
  { sku: 'CUP-01', name: '白瓷杯', unit_price: 3900 },
]

const newKey = () => `${Date.now()}-${Math.random().toString(36).slice(2)}`

Page({
  data: {
    goods: GOODS.map((one) => ({ ...one, yuan: yuan(one.unit_price), quantity: 0 })),
    remark: '',
    total: yuan(0),
    canSubmit: false,
    submitting: false,
    /** @type {ReturnType<typeof describe>} */
    error: null,
  },
  // 同一份订单只用一个幂等键：超时后用户再点一次，也只下一单。One key for one order, however often it is submitted.
  key: newKey(),

  onLoad() {
    this.key = newKey()
  },

  /** @param {WechatMiniprogram.TouchEvent<{}, {}, { index: number, step: number }>} event */
  step(event) {
    const { index, step } = event.currentTarget.dataset
    const goods = this.data.goods.map((one, at) =>
      at === Number(index) ? { ...one, quantity: Math.max(0, one.quantity + Number(step)) } : one,
    )
    const total = goods.reduce((sum, one) => sum + one.quantity * one.unit_price, 0)
    this.change({ goods, total: yuan(total), canSubmit: goods.some((one) => one.quantity) })
  },

  /** @param {WechatMiniprogram.Input} event */
  write(event) {
    this.change({ remark: event.detail.value })
  },

  /** @param {Record<string, unknown>} data */
  change(data) {
    this.key = newKey() // 改过的是另一份订单
    this.setData({ ...data, error: null })
  },

  async submit() {
    if (this.data.submitting || !this.data.canSubmit) return
    this.setData({ submitting: true, error: null })
    const items = this.data.goods
      .filter((one) => one.quantity)
      .map(({ sku, name, unit_price, quantity }) => ({ sku, name, unit_price, quantity }))
    try {
      const order = await api.createOrder({ items, remark: this.data.remark || null }, { idempotencyKey: this.key })
      wx.redirectTo({ url: `/pages/order/order?id=${order.id}` })
    } catch (error) {
      this.setData({ error: describe(error) })
    }
    this.setData({ submitting: false })
  },

  retry() {
    return this.submit()
  },
})
