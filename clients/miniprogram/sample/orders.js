const STATUSES = { pending: '待付款', paid: '已付款', shipped: '已发货', completed: '已完成', cancelled: '已取消' }

/** @param {number} fen 分 */
const yuan = (fen) => (fen / 100).toFixed(2)

/**
 * 订单在页面上的样子。How pages show an order.
 *
 * @typedef {import('./kuaishang').OrderSummary & { statusText: string, yuan: string }} Summary
 * @param {import('./kuaishang').OrderSummary} order
 * @returns {Summary}
 */
const summary = (order) => ({ ...order, statusText: STATUSES[order.status], yuan: yuan(order.total) })

module.exports = { summary, yuan }
