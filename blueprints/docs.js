const language = localStorage.language || (navigator.language.startsWith('en') ? 'en' : 'zh');
document.documentElement.lang = language;
document.querySelector('#language').textContent = language === 'zh' ? 'English' : '中文';
document.querySelector('#language').onclick = () => {
  localStorage.language = language === 'zh' ? 'en' : 'zh';
  location.reload();
};

window.ui = SwaggerUIBundle({
  url: `/openapi.json?lang=${language}`,
  domNode: document.querySelector('main'),
  persistAuthorization: true,
  requestInterceptor: (request) => {
    request.headers['Accept-Language'] = language;
    return request;
  },
  onComplete: () => {
    for (const table of document.querySelectorAll('.info table')) {
      const details = document.createElement('details');
      table.replaceWith(details);
      details.append(document.createElement('summary'), table);
      details.firstChild.textContent = language === 'zh' ? '业务码' : 'Business codes';
    }
  },
});
