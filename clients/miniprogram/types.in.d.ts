// 由 `make client` 从 openapi.json 与 types.in.d.ts 生成，请勿手改。
// Generated from openapi.json and types.in.d.ts by `make client`. Do not edit.

/* SCHEMAS */
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
  /* CODES */
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

  /* OPERATIONS */
  /** 调用文档之外的接口。Calls what is not described. */
  request<Data = unknown>(options: RequestOptions): Promise<Data>
}

export function createClient(options: ClientOptions): Client
