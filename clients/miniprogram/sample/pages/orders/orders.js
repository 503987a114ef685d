const api = require('../../api')
const { describe } = require('../../errors')
const { summary } = require('../../orders')
const { Signal } = require('../../signal')

const PAGE_SIZE = 20

Page({
  data: {
    /** @type {import('../../orders').Summary[]} */
    orders: [],
    loading: false,
    finished: false,
    /** @type {ReturnType<typeof describe>} */
    error: null,
  },
  // 微信为每个页面复制这些字段时会丢失类的方法，所以 Signal 在用时才创建。WeChat copies fields without their class.
  /** @type {Signal | null} */
  signal: null,
  /** @type {import('../../orders').Summary[]} */
  before: [],

  onShow() {
    return this.refresh()
  },

  onUnload() {
    if (this.signal) this.signal.abort()
  },

  async onPullDownRefresh() {
    await this.refresh()
    wx.stopPullDownRefresh()
  },

  onReachBottom() {
    return this.loadMore()
  },

  refresh() {
    if (this.signal) this.signal.abort() // 一次加载未完又要刷新时，以刷新为准
    this.setData({ finished: false })
    return this.load([])
  },

  async loadMore() {
    if (!this.data.loading && !this.data.finished) await this.load(this.data.orders)
  },

  retry() {
    return this.load(this.before)
  },

  /** @param {import('../../orders').Summary[]} before 已有的订单：从最后一个之后接着取 */
  async load(before) {
    const signal = (this.signal = new Signal())
    this.before = before
    this.setData({ loading: true, error: null })
    try {
      const after = before.length ? before[before.length - 1].id : undefined
      const { items } = await api.listOrders({ page_size: PAGE_SIZE, after }, { signal })
      this.setData({ orders: [...before, ...items.map(summary)], finished: items.length < PAGE_SIZE })
    } catch (error) {
      if (!signal.aborted) this.setData({ error: describe(error) })
    }
    if (!signal.aborted) this.setData({ loading: false })
  },

  /** @param {WechatMiniprogram.TouchEvent<{}, {}, { id: number }>} event */
  open(event) {
    wx.navigateTo({ url: `/pages/order/order?id=${event.currentTarget.dataset.id}` })
  },

  create() {
    wx.navigateTo({ url: '/pages/new-order/new-order' })
  },
})
