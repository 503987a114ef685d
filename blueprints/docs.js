const CHINESE = {
  Authorize: '授权', Logout: '退出', Close: '关闭', 'Available authorizations': '授权方式', 'Value:': '值：', Authorized: '已授权',
  'Try it out': '试用', Cancel: '取消', Execute: '执行', Clear: '清除', Reset: '重置', Parameters: '参数', 'No parameters': '无参数',
  Name: '名称', Description: '说明', required: '必填', 'Send empty value': '发送空值', 'Request body': '请求体', Headers: '响应头',
  Responses: '响应', 'Server response': '实际响应', Code: '状态码', Details: '内容', Links: '链接', 'No links': '无', Download: '下载',
  'Request URL': '请求地址', 'Response body': '响应体', 'Response headers': '响应头', 'Headers:': '响应头：', Schema: '结构',
  Schemas: '数据结构', Servers: '服务器', 'Example Value': '示例', 'Edit Value': '编辑', Examples: '示例', 'Examples:': '示例：',
  'Media type': '媒体类型', Type: '类型',
};
const language = localStorage.language || (navigator.language.startsWith('en') ? 'en' : 'zh');
const page = document.querySelector('main');
const button = document.querySelector('#language');
document.documentElement.lang = language;
button.textContent = language === 'zh' ? 'English' : '中文';
button.onclick = () => {
  localStorage.language = language === 'zh' ? 'en' : 'zh';
  location.reload();
};

// Swagger UI speaks English alone. Only the values of text nodes change, which React does not read.
const translate = (node) => {
  const texts = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  for (let text = node.nodeType === Node.TEXT_NODE ? node : texts.nextNode(); text; text = texts.nextNode()) {
    const word = text.nodeValue.trim();
    if (Object.hasOwn(CHINESE, word) && !text.parentNode.closest('pre, code')) text.nodeValue = CHINESE[word];
  }
};
if (language === 'zh') {
  new MutationObserver((records) => {
    for (const { type, target, addedNodes } of records) (type === 'childList' ? addedNodes : [target]).forEach(translate);
  }).observe(page, { childList: true, subtree: true, characterData: true });
}

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
