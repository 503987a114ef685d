const api = require('../../api')
const { describe } = require('../../errors')
const { StaleDataError } = require('../../kuaishang')
const { uploadAvatar } = require('../../upload')

Page({
  data: {
    /** @type {import('../../kuaishang').User | null} */
    user: null,
    avatar: '',
    busy: false,
    notice: '',
    /** @type {ReturnType<typeof describe>} */
    error: null,
  },

  // 客户端在需要时自己登录，打开页面直接取数据即可。The client logs in by itself.
  onLoad() {
    return this.attempt(() => api.getMe())
  },

  retry() {
    return this.attempt(() => api.getMe())
  },

  logIn() {
    return this.attempt(() => api.logIn())
  },

  async logOut() {
    await this.attempt(async () => {
      await api.logOut()
      return null
    })
  },

  /** @param {WechatMiniprogram.FormSubmit} event */
  saveNickname(event) {
    const nickname = event.detail.value.nickname.trim()
    if (nickname) return this.attempt(() => api.setProfile({ nickname }), '昵称已保存')
    this.setData({ notice: '请先填写昵称' })
  },

  /** @param {WechatMiniprogram.CustomEvent<{ avatarUrl: string }>} event */
  async chooseAvatar(event) {
    const file = event.detail.avatarUrl // 手机上的临时文件
    this.setData({ avatar: file })
    await this.attempt(async () => api.setProfile({ avatar_url: await uploadAvatar(file) }), '头像已保存')
  },

  /** @param {WechatMiniprogram.ButtonGetPhoneNumber} event */
  setPhone(event) {
    const { code } = event.detail
    if (code) return this.attempt(() => api.setPhone({ code }), '手机号已绑定')
    this.setData({ notice: '未授权手机号' })
  },

  /**
   * @param {() => Promise<import('../../kuaishang').User | null>} call 返回最新的用户
   * @param {string} notice 成功时的提示
   */
  async attempt(call, notice = '') {
    this.setData({ busy: true, error: null, notice: '' })
    try {
      const user = await call()
      this.setData({ user, avatar: (user && user.avatar_url) || '', notice })
    } catch (error) {
      if (error instanceof StaleDataError) this.setData({ notice: '数据已过时，请再点一次按钮' })
      else this.setData({ error: describe(error) })
    }
    this.setData({ busy: false })
  },
})
