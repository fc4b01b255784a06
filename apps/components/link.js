// Copies the address of the page. Where the browser forbids it, the address is shown to be copied by hand.

const SHOWN_MS = 4000;

export default function ({ parentElement }) {
  const button = parentElement.querySelector(".copy");
  const said = parentElement.querySelector(".said");
  let timer;
  button.onclick = async () => {
    const address = window.location.href;
    clearTimeout(timer);
    try {
      await navigator.clipboard.writeText(address);
      said.textContent = "Link copied.";
      timer = setTimeout(() => (said.textContent = ""), SHOWN_MS);
    } catch {
      said.textContent = address;
    }
  };
  return () => clearTimeout(timer);
}
