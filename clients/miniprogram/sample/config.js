module.exports = {
  // 服务的地址；上线时换成自己的 https 域名。Your service.
  baseUrl: 'http://127.0.0.1:8000',
  // `make run` 的微信模拟器，使没有账号时也能登录；openid 任取，换一个就是另一个用户（先退出登录，或清除缓存）。有账号后改成 null。
  // The WeChat simulator: null once you have an account.
  simulator: { url: 'http://127.0.0.1:8001', openid: 'o-sample' },
}
