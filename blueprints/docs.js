const language = localStorage.language || (navigator.language.startsWith('en') ? 'en' : 'zh');
const page = document.querySelector('main');
const button = document.querySelector('#language');
document.documentElement.lang = language;
button.textContent = language === 'zh' ? 'English' : '中文';
button.onclick = () => {
  localStorage.language = language === 'zh' ? 'en' : 'zh';
  location.reload();
};

window.ui = SwaggerUIBundle({
  url: `/openapi.json?lang=${language}`,
  domNode: page,
  defaultModelsExpandDepth: 0,
  persistAuthorization: true,
  requestInterceptor: (request) => {
    request.headers['Accept-Language'] = language;
    return request;
  },
  onComplete: () => {
    for (const table of page.querySelectorAll('.info table')) {
      const details = document.createElement('details');
      table.replaceWith(details);
      details.append(document.createElement('summary'), table);
      details.firstChild.textContent = language === 'zh' ? '业务码' : 'Codes';
    }
  },
});
