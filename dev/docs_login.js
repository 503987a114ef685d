// A button on the page /docs under `make run`: a code from the simulator, login, and Authorize in one click.
const button = document.createElement('button');
button.id = 'log-in';
button.textContent = document.documentElement.lang === 'zh' ? '用模拟微信登录' : 'Log in with the WeChat simulator';
const post = async (path, body) => {
  const headers = { 'Content-Type': 'application/json' };
  // Without the cookie of a session, which would go on after a Logout on the page.
  const response = await fetch(path, { method: 'POST', credentials: 'omit', headers, body: JSON.stringify(body) });
  return response.json();
};
button.onclick = async () => {
  const { data } = await post('/api/v1/auth/wechat', await post('/docs/code'));
  window.ui.preauthorizeApiKey('bearer', data.token);
  window.ui.authActions.persistAuthorizationIfNeeded();
};
document.querySelector('header').append(button);
