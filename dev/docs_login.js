// A button on the page /docs under `make run`: a code from the simulator, login, and Authorize in one click.
const button = document.createElement('button');
button.id = 'log-in';
button.textContent = document.documentElement.lang === 'zh' ? '用模拟微信登录' : 'Log in with the WeChat simulator';
button.onclick = async () => {
  const post = async (path, body) =>
    (await fetch(path, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) })).json();
  const { data } = await post('/api/v1/auth/wechat', await post('/docs/code'));
  window.ui.preauthorizeApiKey('bearer', data.token);
  window.ui.authActions.persistAuthorizationIfNeeded();
};
document.querySelector('header').append(button);
