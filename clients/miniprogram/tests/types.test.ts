/** What kuaishang.d.ts promises, checked by `tsc --strict`: each @ts-expect-error must be an error. */
import { ApiError, ConflictError, StaleDataError, createClient } from '../kuaishang'
import type { ApiErrorCode, Client, Item, LocalErrorCode, Order, OrderSummary, User } from '../kuaishang'

type Equal<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false
/** Compiles if the type of the value is exactly T. */
const is = <T>() => <V>(_: V, __: Equal<T, V> extends true ? 'same' : never) => {}

const api: Client = createClient({ baseUrl: 'https://api.example.com', timeout: 30000, storageKey: 'kuaishang' })
// @ts-expect-error: without the service's URL
createClient({})
// @ts-expect-error: an option that there is not
createClient({ baseUrl: 'https://api.example.com', retries: 3 })

export async function calls() {
  is<User>()(await api.logIn(), 'same')
  is<User>()(await api.getMe(), 'same')
  is<User>()(await api.getUser({ user_id: 'me' }), 'same')
  is<User>()(await api.getUser({ user_id: 1 }), 'same')
  is<'user' | 'admin'>()((await api.getMe()).role, 'same')
  // @ts-expect-error: not a field of a user
  ;(await api.getMe()).openid

  const items = [{ sku: 'tea-1', name: '龙井茶', quantity: 2, unit_price: 1250 }]
  const order = await api.createOrder({ items }, { idempotencyKey: 'one', timeout: 1000, priority: true })
  is<Order>()(order, 'same')
  is<Item[]>()(order.items, 'same')
  is<string | null>()(order.remark, 'same')
  // @ts-expect-error: an order has items
  await api.createOrder({ remark: '少糖' })
  // @ts-expect-error: without a quantity
  await api.createOrder({ items: [{ sku: 'tea-1', name: '龙井茶', unit_price: 1250 }] })
  // @ts-expect-error: the service sets the total
  await api.createOrder({ items, total: 1 })
  // @ts-expect-error: the service sets the subtotal
  await api.createOrder({ items: [{ ...items[0], subtotal: 1 }, { sku: 'x', name: 'x', quantity: 1, unit_price: 1, subtotal: 1 }] })

  is<Order>()(await api.updateOrder({ order_id: order.id, status: 'cancelled' }, { version: order.version }), 'same')
  // @ts-expect-error: which order?
  await api.updateOrder({ remark: '少糖' })
  // @ts-expect-error: no such status
  await api.updateOrder({ order_id: 1, status: 'lost' })

  is<OrderSummary[]>()((await api.listOrders()).items, 'same')
  is<number>()((await api.listOrders({ page_size: 20, after: undefined })).total, 'same')
  // @ts-expect-error: a number
  await api.listOrders({ page: '1' })
  // @ts-expect-error: a summary has no items
  ;(await api.listOrders()).items[0].items

  await api.setPhone({ code: 'e31968a7f94cc' })
  await api.setPhone({ encryptedData: '…', iv: '…' })
  // @ts-expect-error: an iv alone
  await api.setPhone({ iv: '…' })
  // @ts-expect-error: it takes one of the two
  await api.setPhone()
  await api.setProfile({ nickname: '小明' })
  await api.logOut()
  // @ts-expect-error: it takes nothing
  await api.logOut({ all: true })
  // @ts-expect-error: no such operation
  await api.cancelOrder({ order_id: 1 })

  is<{ granted: boolean }>()(await api.request<{ granted: boolean }>({ method: 'POST', path: '/api/v1/x', body: {} }), 'same')
  // @ts-expect-error: no path
  await api.request({ method: 'GET' })
}

export async function cancels() {
  const signal: { aborted: boolean; onabort: (() => void) | null } = { aborted: false, onabort: null }
  await api.getMe({}, { signal })
  // @ts-expect-error: not a signal
  await api.getMe({}, { signal: 'now' })
}

export function failures(error: unknown) {
  if (error instanceof ConflictError) return (error as ConflictError<Order>).current?.remark
  if (error instanceof StaleDataError) is<string>()(error.traceId, 'same')
  if (!(error instanceof ApiError)) return undefined
  is<number>()(error.status, 'same')
  is<string>()(error.message, 'same')
  is<boolean>()(error.retryable, 'same')
  is<string | undefined>()(error.data?.errMsg, 'same')
  is<ApiErrorCode | LocalErrorCode>()(error.code, 'same')
  const { code } = error
  if (code === 429 || code === 'OFFLINE') return ''
  // @ts-expect-error: no operation gives it
  return code === 418 ? '' : undefined
}

const stale: ApiErrorCode<'setPhone'> = 463
// @ts-expect-error: a read has no conflict
const conflict: ApiErrorCode<'getOrder'> = 409
export { conflict, stale }
