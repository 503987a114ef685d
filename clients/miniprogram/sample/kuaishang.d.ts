// 由 `make client` 从 openapi.json 与 types.in.d.ts 生成，请勿手改。
// Generated from openapi.json and types.in.d.ts by `make client`. Do not edit.

export interface WechatSession {
    /**
     * @description 为 false 时，先登录再提交加密数据
     * @example true
     */
    valid: boolean;
}
export interface User {
    /** @example 1 */
    id: number;
    /** @example 小明 */
    nickname: string | null;
    /** @example https://example.com/avatar.png */
    avatar_url: string | null;
    /**
     * @description 已脱敏
     * @example 138****8000
     */
    phone: string | null;
    /**
     * @example user
     * @enum {string}
     */
    role: "user" | "admin";
    /**
     * Format: date-time
     * @example 2026-11-26T08:00:00Z
     */
    created_at: string;
    /**
     * Format: date-time
     * @example 2026-11-26T08:00:00Z
     */
    updated_at: string;
    /**
     * @description 用作 If-Match，须加引号
     * @example 1
     */
    version: number;
}
export interface GetUserArgs {
    user_id: string | number;
}
export interface UpdateUserArgs {
    user_id: string | number;
    /**
     * @description null 表示删除
     * @example 小明
     */
    nickname?: string | null;
    /** @example https://example.com/avatar.png */
    avatar_url?: string | null;
    /**
     * @description 仅限管理员
     * @example user
     * @enum {string}
     */
    role?: "user" | "admin";
    /**
     * @description 仅限管理员；为 true 时其请求得到 403
     * @example false
     */
    blocked?: boolean;
}
export interface DeleteUserArgs {
    user_id: string | number;
}
export type SetPhoneArgs = {
    /**
     * @description getPhoneNumber 按钮返回的 code
     * @example e31968a7f94cc
     */
    code: string;
} | {
    /**
     * @description Base64，微信原样返回的
     * @example CiyLU1Aw2KjvrjMdj8YK…
     */
    encryptedData: string;
    /**
     * @description Base64，微信原样返回的
     * @example r7BXXKkLb8qrSNn05n0qiA==
     */
    iv: string;
};
export type SetProfileArgs = {
    /**
     * @description null 表示删除
     * @example 小明
     */
    nickname?: string | null;
    /** @example https://example.com/avatar.png */
    avatar_url?: string | null;
} | {
    /**
     * @description Base64，微信原样返回的
     * @example CiyLU1Aw2KjvrjMdj8YK…
     */
    encryptedData: string;
    /**
     * @description Base64，微信原样返回的
     * @example r7BXXKkLb8qrSNn05n0qiA==
     */
    iv: string;
    /**
     * @description JSON 文本，微信原样返回的
     * @example {"nickName":"小明"}
     */
    rawData: string;
    /**
     * @description rawData 的签名，微信原样返回的
     * @example 75e81ceda165f4ffa64f4068af58c6
     */
    signature: string;
};
export interface MaskedPersonalData {
    /**
     * @description 已脱敏
     * @example 138****8000
     */
    phone: string | null;
    /**
     * @description 已脱敏
     * @example 王**
     */
    real_name: string | null;
    /**
     * @description 已脱敏
     * @example 110***********002X
     */
    id_card: string | null;
    /**
     * @description 已脱敏
     * @example x***@example.com
     */
    email: string | null;
    /**
     * @description 已脱敏
     * @example ************2230
     */
    bank_card: string | null;
    /**
     * @description 用作 If-Match，须加引号
     * @example 1
     */
    version: number;
}
export interface GetPersonalDataArgs {
    user_id: string | number;
}
export interface UpdatePersonalDataArgs {
    user_id: string | number;
    /** @example 王小明 */
    real_name?: string | null;
    /** @example 11010519491231002X */
    id_card?: string | null;
    /**
     * Format: email
     * @example xiaoming@example.com
     */
    email?: string | null;
    /** @example 6222020200112230 */
    bank_card?: string | null;
}
export interface FullPersonalData {
    /** @example 13800138000 */
    phone: string | null;
    /** @example 王小明 */
    real_name: string | null;
    /** @example 11010519491231002X */
    id_card: string | null;
    /** @example xiaoming@example.com */
    email: string | null;
    /** @example 6222020200112230 */
    bank_card: string | null;
    /**
     * @description 用作 If-Match，须加引号
     * @example 1
     */
    version: number;
}
export interface GetFullPersonalDataArgs {
    user_id: string | number;
}
export interface Export {
    user: User;
    /** @example null */
    unionid: string | null;
    personal_data: PersonalData;
    identities: Identity[];
    orders: Order[];
}
export interface PersonalData {
    /** @example 13800138000 */
    phone: string | null;
    /** @example 王小明 */
    real_name: string | null;
    /** @example 11010519491231002X */
    id_card: string | null;
    /** @example xiaoming@example.com */
    email: string | null;
    /** @example 6222020200112230 */
    bank_card: string | null;
}
export interface Identity {
    /** @example wx0123456789abcdef */
    app_id: string;
    /** @example oGZUI0egBJY1zhBYw2KhdUfwVJJE */
    openid: string;
    /**
     * Format: date-time
     * @example 2026-11-26T08:00:00Z
     */
    created_at: string;
}
export interface Order {
    /** @example 1 */
    id: number;
    /**
     * @description 用户已注销时为 null
     * @example 1
     */
    user_id: number | null;
    /**
     * @example pending
     * @enum {string}
     */
    status: "pending" | "paid" | "shipped" | "completed" | "cancelled";
    /**
     * @default null
     * @example 少糖
     */
    remark: string | null;
    /**
     * @description 单位：分
     * @example 2500
     */
    total: number;
    items: Item[];
    /**
     * Format: date-time
     * @example 2026-11-26T08:00:00Z
     */
    created_at: string;
    /**
     * Format: date-time
     * @example 2026-11-26T08:00:00Z
     */
    updated_at: string;
    /**
     * @description 用作 If-Match，须加引号
     * @example 1
     */
    version: number;
}
export interface Item {
    /** @example 1 */
    id: number;
    /** @example tea-1 */
    sku: string;
    /** @example 龙井茶 */
    name: string;
    /** @example 2 */
    quantity: number;
    /**
     * @description 单位：分
     * @example 1250
     */
    unit_price: number;
    /**
     * @description 单位：分
     * @example 2500
     */
    subtotal: number;
}
export interface UserPage {
    items: User[];
    /** @example 1 */
    page: number;
    /** @example 20 */
    page_size: number;
    /** @example 1 */
    total: number;
}
export interface ListUsersArgs {
    /** @default 1 */
    page?: number;
    /** @default 20 */
    page_size?: number;
    /** @description 上一页最后一项的 id，页码从其后算起；与第一页一样快 */
    after?: number;
    /**
     * @description `-` 表示最新的在前
     * @default -created_at
     * @enum {string}
     */
    sort?: "created_at" | "-created_at";
}
export interface CreateUserArgs {
    /**
     * @description null 表示删除
     * @example 小明
     */
    nickname?: string | null;
    /** @example https://example.com/avatar.png */
    avatar_url?: string | null;
    /**
     * @description 仅限管理员
     * @example user
     * @enum {string}
     */
    role?: "user" | "admin";
    /**
     * @description 该用户在小程序中的 openid
     * @example oGZUI0egBJY1zhBYw2KhdUfwVJJE
     */
    openid: string;
}
export interface SearchUsersArgs {
    /**
     * @default 1
     * @example 1
     */
    page?: number;
    /**
     * @default 20
     * @example 20
     */
    page_size?: number;
    /**
     * @description 上一页最后一项的 id，页码从其后算起；与第一页一样快
     * @example 100
     */
    after?: number;
    /**
     * @description `-` 表示最新的在前
     * @default -created_at
     * @example -created_at
     * @enum {string}
     */
    sort?: "created_at" | "-created_at";
    /**
     * @description 与完整号码匹配
     * @example 13800138000
     */
    phone: string;
}
export interface OrderSummaryPage {
    items: OrderSummary[];
    /** @example 1 */
    page: number;
    /** @example 20 */
    page_size: number;
    /** @example 1 */
    total: number;
}
export interface OrderSummary {
    /** @example 1 */
    id: number;
    /**
     * @description 用户已注销时为 null
     * @example 1
     */
    user_id: number | null;
    /**
     * @example pending
     * @enum {string}
     */
    status: "pending" | "paid" | "shipped" | "completed" | "cancelled";
    /**
     * @default null
     * @example 少糖
     */
    remark: string | null;
    /**
     * @description 单位：分
     * @example 2500
     */
    total: number;
    /**
     * Format: date-time
     * @example 2026-11-26T08:00:00Z
     */
    created_at: string;
    /**
     * Format: date-time
     * @example 2026-11-26T08:00:00Z
     */
    updated_at: string;
    /**
     * @description 用作 If-Match，须加引号
     * @example 1
     */
    version: number;
}
export interface ListOrdersArgs {
    /** @default 1 */
    page?: number;
    /** @default 20 */
    page_size?: number;
    /** @description 上一页最后一项的 id，页码从其后算起；与第一页一样快 */
    after?: number;
    /**
     * @description `-` 表示最新的在前
     * @default -created_at
     * @enum {string}
     */
    sort?: "created_at" | "-created_at";
    /** @description 仅限管理员 */
    user_id?: number;
    /** @enum {string} */
    status?: "pending" | "paid" | "shipped" | "completed" | "cancelled";
}
export interface ItemInput {
    /** @example tea-1 */
    sku: string;
    /** @example 龙井茶 */
    name: string;
    /** @example 2 */
    quantity: number;
    /**
     * @description 单位：分
     * @example 1250
     */
    unit_price: number;
}
export interface CreateOrderArgs {
    /**
     * @default null
     * @example 少糖
     */
    remark?: string | null;
    items: ItemInput[];
}
export interface GetOrderArgs {
    /** Format: int64 */
    order_id: number;
}
export interface UpdateOrderArgs {
    /** Format: int64 */
    order_id: number;
    /** @example 少糖，放门口 */
    remark?: string | null;
    /**
     * @description 可变为：pending → paid, cancelled；paid → shipped, cancelled；shipped → completed
     * @example cancelled
     * @enum {string}
     */
    status?: "pending" | "paid" | "shipped" | "completed" | "cancelled";
}
export interface DeleteOrderArgs {
    /** Format: int64 */
    order_id: number;
}
export interface ShownItemPage {
    items: ShownItem[];
    /** @example 1 */
    page: number;
    /** @example 20 */
    page_size: number;
    /** @example 1 */
    total: number;
}
export interface ShownItem {
    /** @example 1 */
    id: number;
    /** @example tea-1 */
    sku: string;
    /** @example 龙井茶 */
    name: string;
    /** @example 2 */
    quantity: number;
    /**
     * @description 单位：分
     * @example 1250
     */
    unit_price: number;
    /**
     * @description 单位：分
     * @example 2500
     */
    subtotal: number;
    /**
     * @description 用作 If-Match，须加引号
     * @example 1
     */
    version: number;
}
export interface ListOrderItemsArgs {
    /** Format: int64 */
    order_id: number;
    /** @default 1 */
    page?: number;
    /** @default 20 */
    page_size?: number;
}
export interface CreateOrderItemArgs {
    /** Format: int64 */
    order_id: number;
    /** @example tea-1 */
    sku: string;
    /** @example 龙井茶 */
    name: string;
    /** @example 2 */
    quantity: number;
    /**
     * @description 单位：分
     * @example 1250
     */
    unit_price: number;
}
export interface GetOrderItemArgs {
    /** Format: int64 */
    order_id: number;
    /** Format: int64 */
    item_id: number;
}
export interface UpdateOrderItemArgs {
    /** Format: int64 */
    order_id: number;
    /** Format: int64 */
    item_id: number;
    /** @example tea-1 */
    sku?: string;
    /** @example 龙井茶 */
    name?: string;
    /** @example 2 */
    quantity?: number;
    /**
     * @description 单位：分
     * @example 1250
     */
    unit_price?: number;
}
export interface DeleteOrderItemArgs {
    /** Format: int64 */
    order_id: number;
    /** Format: int64 */
    item_id: number;
}
/** 没有内容。Nothing. */
export type Empty = Record<string, never>

/** `createClient` 的参数。What `createClient` takes. */
export interface ClientOptions {
  /** 服务的地址，如 `https://api.example.com`。The service's URL. */
  baseUrl: string
  /** 每次调用的总时限，含排队与重试，毫秒；默认 30000。Milliseconds for a call with its waits and retries. */
  timeout?: number
  /** 保存登录状态的本地缓存的键，默认 `kuaishang`。Where the session is stored. */
  storageKey?: string
}

/** 取消用的信号：AbortController 的 `signal`，或任何有这些的对象。Cancels a call; an AbortController's `signal` is one. */
export interface Signal {
  readonly aborted?: boolean
  onabort?: ((event?: any) => unknown) | null
  addEventListener?(type: 'abort', listener: () => void): void
  removeEventListener?(type: 'abort', listener: () => void): void
}

/** 每次调用可选的设置。What a single call can set. */
export interface Options {
  /** 取消这次调用。Cancels this call. */
  signal?: Signal
  /** 这次调用的总时限，毫秒。Milliseconds for this call. */
  timeout?: number
  /** 先于其他排队的请求。Goes before other requests that wait. */
  priority?: boolean
  /** 作为 If-Match 发送的版本；默认用上次读到的。The version for If-Match; by default the one that was read last. */
  version?: number | string
  /** 幂等键；默认每次调用一个。The Idempotency-Key; by default a new one for each call. */
  idempotencyKey?: string
}

/** `request()` 的参数。What `request()` takes. */
export interface RequestOptions extends Options {
  method?: 'GET' | 'POST' | 'PUT' | 'DELETE'
  /** 路径，如 `/api/v1/orders`。 */
  path: string
  body?: unknown
  /** 其中的 Idempotency-Key 与 If-Match 优先于客户端的。Its Idempotency-Key and If-Match replace the client's. */
  headers?: Record<string, string>
}

/** 每个操作文档中的业务码。The documented business codes of each operation. */
export interface ErrorCodes {
  getWechatSession: 400 | 401 | 403 | 405 | 429 | 500 | 502 | 503 | 504 | 520
  logIn: 400 | 403 | 405 | 413 | 429 | 460 | 461 | 462 | 500 | 502 | 503 | 504 | 520
  logOut: 400 | 401 | 403 | 405 | 429 | 500 | 503
  logOutEverywhere: 400 | 401 | 403 | 405 | 429 | 500 | 503
  getUser: 400 | 401 | 403 | 404 | 405 | 429 | 500 | 503
  updateUser: 400 | 401 | 403 | 404 | 405 | 409 | 412 | 413 | 415 | 428 | 429 | 463 | 466 | 500 | 502 | 503 | 504 | 520
  deleteUser: 400 | 401 | 403 | 404 | 405 | 409 | 412 | 428 | 429 | 500 | 503
  setPhone: 400 | 401 | 403 | 405 | 413 | 415 | 429 | 460 | 461 | 463 | 464 | 500 | 502 | 503 | 504 | 520
  setProfile: 400 | 401 | 403 | 405 | 413 | 415 | 429 | 463 | 464 | 466 | 500 | 502 | 503 | 504 | 520
  getPersonalData: 400 | 401 | 403 | 404 | 405 | 429 | 500 | 503
  updatePersonalData: 400 | 401 | 403 | 404 | 405 | 409 | 412 | 413 | 415 | 428 | 429 | 500 | 503
  getFullPersonalData: 400 | 401 | 403 | 404 | 405 | 429 | 500 | 503
  exportPersonalData: 400 | 401 | 403 | 405 | 429 | 500 | 503
  listUsers: 400 | 401 | 403 | 405 | 429 | 500 | 503
  createUser: 400 | 401 | 403 | 405 | 409 | 413 | 415 | 429 | 465 | 500 | 503
  searchUsers: 400 | 401 | 403 | 405 | 413 | 415 | 429 | 500 | 503
  listOrders: 400 | 401 | 403 | 404 | 405 | 429 | 500 | 503
  createOrder: 400 | 401 | 403 | 405 | 409 | 413 | 415 | 429 | 465 | 500 | 503
  getOrder: 400 | 401 | 403 | 404 | 405 | 429 | 500 | 503
  updateOrder: 400 | 401 | 403 | 404 | 405 | 409 | 412 | 413 | 415 | 428 | 429 | 500 | 503
  deleteOrder: 400 | 401 | 403 | 404 | 405 | 409 | 412 | 428 | 429 | 500 | 503
  listOrderItems: 400 | 401 | 403 | 404 | 405 | 429 | 500 | 503
  createOrderItem: 400 | 401 | 403 | 404 | 405 | 409 | 413 | 415 | 429 | 465 | 500 | 503
  getOrderItem: 400 | 401 | 403 | 404 | 405 | 429 | 500 | 503
  updateOrderItem: 400 | 401 | 403 | 404 | 405 | 409 | 412 | 413 | 415 | 428 | 429 | 500 | 503
  deleteOrderItem: 400 | 401 | 403 | 404 | 405 | 409 | 412 | 428 | 429 | 500 | 503
}

/** 一个操作的业务码；不指明操作时为全部。The codes of an operation, or of all of them. */
export type ApiErrorCode<Operation extends keyof ErrorCodes = keyof ErrorCodes> = ErrorCodes[Operation]

/** 没有收到服务的响应时的 `code`。The `code` of a failure without a response of the service. */
export type LocalErrorCode = 'ABORTED' | 'LOGIN_LIMIT' | 'NETWORK' | 'OFFLINE' | 'TIMEOUT'

/** 调用失败。A call failed. */
export class ApiError extends Error {
  /** 业务码，或 LocalErrorCode。The business code, or a LocalErrorCode. */
  readonly code: ApiErrorCode | LocalErrorCode
  /** HTTP 状态；没有响应时为 0。The HTTP status; 0 without a response. */
  readonly status: number
  /** 反馈问题时请附上；没有响应时为空。Finds the request in the service's logs; empty without a response. */
  readonly traceId: string
  /** 稍后原样重试可能成功。The same call may succeed later. */
  readonly retryable: boolean
  /**
   * 400 时 `data.errors` 指明字段；NETWORK 时 `data.errMsg` 是微信给出的原因。
   * `data.errors` names the fields of a 400; `data.errMsg` is WeChat's reason of NETWORK.
   */
  readonly data: { errors?: Record<string, unknown>; errMsg?: string } | null
}

/** 412：读过之后已被修改。The resource has changed since it was read. */
export class ConflictError<Current = unknown> extends ApiError {
  /** 现在的内容；读不到时为 null。The resource as it is now; null if it cannot be read. */
  readonly current: Current | null
}

/** 463：微信的数据已过时，请重新获取再提交。WeChat's data is stale: get it again. */
export class StaleDataError extends ApiError {}

export interface Client {
  /** 登录，返回当前用户；其他函数会自己登录。Logs in, as the other functions do by themselves. */
  logIn(): Promise<User>

  /** 当前用户。The current user. */
  getMe(args?: Empty, options?: Options): Promise<User>

  /**
   * 查询微信 session_key 是否仍有效
   *
   * 网页登录的用户：查询网页授权是否仍有效。
   */
  getWechatSession(args?: Empty, options?: Options): Promise<WechatSession>
  /**
   * 退出登录
   *
   * 此 token 不再有效。
   */
  logOut(args?: Empty, options?: Options): Promise<Empty>
  /**
   * 在所有设备上退出登录
   *
   * 该用户的所有 token 都不再有效。
   */
  logOutEverywhere(args?: Empty, options?: Options): Promise<Empty>
  /**
   * 查看用户
   *
   * `me` 是自己；管理员可查看任何用户。
   */
  getUser(args: GetUserArgs, options?: Options): Promise<User>
  /**
   * 修改用户
   *
   * 未给出的字段保持不变。只有管理员能修改角色或封禁用户。
   */
  updateUser(args: UpdateUserArgs, options?: Options): Promise<User>
  /**
   * 注销用户
   *
   * 立即清除全部个人信息并结束全部会话。订单保留，但不再含有个人和备注。
   */
  deleteUser(args: DeleteUserArgs, options?: Options): Promise<Empty>
  /**
   * 保存自己的手机号
   *
   * 用 `getPhoneNumber` 按钮的 `code`（不是 `wx.login` 的 code），或旧版本的 `encryptedData` 和 `iv`。
   */
  setPhone(args: SetPhoneArgs, options?: Options): Promise<User>
  /**
   * 保存自己的昵称和头像
   *
   * 用户输入的昵称和选择的头像；旧版小程序也可用 `wx.getUserProfile` 返回的全部： `rawData`、`signature`、`encryptedData` 和 `iv`（新版只得到默认头像与“微信用户”）。
   */
  setProfile(args: SetProfileArgs, options?: Options): Promise<User>
  /**
   * 查看个人信息（已脱敏）
   *
   * 完整的内容见 `…/personal-data/full`。
   */
  getPersonalData(args: GetPersonalDataArgs, options?: Options): Promise<MaskedPersonalData>
  /**
   * 修改个人信息
   *
   * 未给出的字段保持不变，null 表示删除。手机号只能来自微信。
   */
  updatePersonalData(args: UpdatePersonalDataArgs, options?: Options): Promise<MaskedPersonalData>
  /**
   * 查看完整的个人信息
   *
   * 每次查看都会记入日志。
   */
  getFullPersonalData(args: GetFullPersonalDataArgs, options?: Options): Promise<FullPersonalData>
  /**
   * 导出关于自己的全部数据
   *
   * 完整数据，每次导出都会记入日志。列表分段读取和发送：每个订单是某一时刻的样子，导出期间新增或修改的内容可能缺失。中断的响应不是合法的 JSON。
   */
  exportPersonalData(args?: Empty, options?: Options): Promise<Export>
  /**
   * 列出所有用户（管理员）
   *
   * `total` 最多为 10,000。
   */
  listUsers(args?: ListUsersArgs, options?: Options): Promise<UserPage>
  /**
   * 在首次登录前创建用户（管理员）
   *
   * 此 openid 首次登录时即为该用户。
   */
  createUser(args: CreateUserArgs, options?: Options): Promise<User>
  /**
   * 按手机号查找用户（管理员）
   *
   * 不保存任何内容的 POST：放在 URL 里的号码会留在代理的日志中。
   */
  searchUsers(args: SearchUsersArgs, options?: Options): Promise<UserPage>
  /**
   * 列出自己的订单
   *
   * 不含明细，明细见 `GET /orders/{order_id}`。管理员可列出所有用户的订单。`total` 最多为 10,000。
   */
  listOrders(args?: ListOrdersArgs, options?: Options): Promise<OrderSummaryPage>
  /**
   * 创建订单
   *
   * 总额由服务端计算。
   */
  createOrder(args: CreateOrderArgs, options?: Options): Promise<Order>
  /**
   * 查看订单
   *
   * 含明细。别人的订单是 404。
   */
  getOrder(args: GetOrderArgs, options?: Options): Promise<Order>
  /**
   * 修改订单的备注或状态
   *
   * 未给出的字段保持不变。买家可以取消 `pending` 或 `paid` 订单，并完成 `shipped` 订单；其他状态由管理员或支付回调设定。
   */
  updateOrder(args: UpdateOrderArgs, options?: Options): Promise<Order>
  /**
   * 删除 pending 订单
   *
   * 其他状态的订单为账目保留，返回 409。
   */
  deleteOrder(args: DeleteOrderArgs, options?: Options): Promise<Empty>
  /**
   * 列出订单的明细
   *
   * 按添加的先后排列。
   */
  listOrderItems(args: ListOrderItemsArgs, options?: Options): Promise<ShownItemPage>
  /**
   * 为 pending 订单添加明细
   *
   * 订单的总额与版本随之改变。
   */
  createOrderItem(args: CreateOrderItemArgs, options?: Options): Promise<ShownItem>
  /**
   * 查看订单的一项明细
   *
   * 其 `version` 是订单的版本。
   */
  getOrderItem(args: GetOrderItemArgs, options?: Options): Promise<ShownItem>
  /**
   * 修改 pending 订单的明细
   *
   * 未给出的字段保持不变。
   */
  updateOrderItem(args: UpdateOrderItemArgs, options?: Options): Promise<ShownItem>
  /**
   * 删除 pending 订单的一项明细
   *
   * 最后一项不能删除，返回 409：请改为删除订单。
   */
  deleteOrderItem(args: DeleteOrderItemArgs, options?: Options): Promise<Empty>
  /** 调用文档之外的接口。Calls what is not described. */
  request<Data = unknown>(options: RequestOptions): Promise<Data>
}

export function createClient(options: ClientOptions): Client
