/**
 * 没有账号时，让 wx.login 从 `make run` 的模拟器取得 code：真实的 code 模拟器不认得。正式的小程序不需要此文件。
 * Lets wx.login take its codes from the simulator, for development without an account.
 *
 * @param {{ url: string, openid: string }} simulator 模拟器的地址，和由它扮演的用户
 */
function simulateLogin({ url, openid }) {
  /** @param {WechatMiniprogram.LoginOption} options */
  const login = ({ success = () => {}, fail = () => {}, complete = () => {} } = {}) => {
    wx.request({
      url: `${url}/simulator/codes`,
      method: 'POST',
      data: { openid },
      success: ({ data }) => success({ .../** @type {{ code: string }} */ (data), errMsg: 'login:ok' }),
      fail: ({ errMsg }) => fail({ errMsg: `login:fail simulator: ${errMsg}`, errno: -1 }),
      complete,
    })
  }
  Object.defineProperty(wx, 'login', { configurable: true, get: () => login })
}

module.exports = { simulateLogin }
